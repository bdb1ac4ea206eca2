"""Draw the demo's comparison: rows of samples under their captions."""

from PIL import Image, ImageDraw, ImageFont


CELL = 128  # px; samples are enlarged to this
GAP = 6
LEFT = 110  # px for the labels of the rows
TOP = 64  # px for the captions


def draw_comparison(rows, captions):
    """Draw samples in a grid.

    Args:
        rows: dict label -> uint8 array [columns, H, W, 3]; a label may have line breaks.
        captions: one per column.

    Returns:
        An RGB `PIL.Image`.
    """
    width = LEFT + len(captions) * (CELL + GAP)
    height = TOP + len(rows) * (CELL + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = LEFT + column * (CELL + GAP)
        words = caption.split()
        lines = "\n".join((" ".join(words[:2]), " ".join(words[2:4]), " ".join(words[4:])))
        pen.multiline_text((x, 6), lines, fill="black", font=ImageFont.load_default(14))
    for row, (label, images) in enumerate(rows.items()):
        y = TOP + row * (CELL + GAP)
        pen.multiline_text((8, y + CELL // 2 - 20), label, fill="black", font=ImageFont.load_default(18))
        for column, image in enumerate(images):
            cell = Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (LEFT + column * (CELL + GAP), y))
    return sheet
