# What the runs share. Each file sets TEACHER, SCRIPT, CARD, OUT and FLAGS, and then calls these functions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TOKENIZERS_PARALLELISM=false

# The variables with which every run can be made smaller, and what they are otherwise.
DATA=${DATA:?a captions JSON as in README.md, such as data.json}
PROMPTS=${PROMPTS:-runs/coco.txt}            # one caption per line, for the evaluation
INCEPTION=${INCEPTION:-runs/inception.pt}
METRICS=${METRICS:-fid patch_fid clip pickscore}
TRAIN=${TRAIN:-}                             # more flags of the training script
EVALUATE=${EVALUATE:-}                       # more flags of evaluate.py
IMAGES=${IMAGES:-1}                          # images of each prompt
TABLE=${TABLE:-runs/table.md}

# Downloads what the evaluation needs and is not there: 5,000 captions of COCO 2017 and StyleGAN's Inception.
download() {
    if [ ! -f "$PROMPTS" ]; then
        curl -fL -o runs/coco.zip http://images.cocodataset.org/annotations/annotations_trainval2017.zip
        python - "$PROMPTS" <<'PYTHON'
import json, sys, zipfile
rows = json.loads(zipfile.ZipFile("runs/coco.zip").read("annotations/captions_val2017.json"))["annotations"]
first = {row["image_id"]: " ".join(row["caption"].split()) for row in sorted(rows, key=lambda row: -row["id"])}
open(sys.argv[1], "w").write("\n".join(first[image] for image in sorted(first)) + "\n")
PYTHON
    fi
    if [ ! -f "$INCEPTION" ]; then
        url=https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt
        curl -fL -o "$INCEPTION.part" "$url"
        mv "$INCEPTION.part" "$INCEPTION"
    fi
}

# Prints memory and hours, and ends here if the student does not fit the card.
dry_run() {
    accelerate launch "${LAUNCH[@]}" "$SCRIPT" "${FLAGS[@]}" $TRAIN --dry_run --dry_run_output "$OUT-dry-run.json"
    python -c "import json, sys
fits = json.load(open(sys.argv[1]))['fits']
sys.exit(None if sys.argv[2] in fits else f'does not fit {sys.argv[2]}: it fits {fits}')" "$OUT-dry-run.json" "$CARD"
}

# Trains, or goes on from the last checkpoint. A complete export is not trained again.
train() {
    local resume=()
    if compgen -G "$OUT/checkpoint-*/state.json" > /dev/null; then resume=(--resume_from_checkpoint latest); fi
    if [ ! -f "$OUT/senseflow.json" ]; then
        accelerate launch "${LAUNCH[@]}" "$SCRIPT" "${FLAGS[@]}" $TRAIN "${resume[@]}"
    fi
}

# Generates with the student, and with the teacher by the arguments, measures one against the other, and adds a row
# and the paper's, if there is one, to the table.
# Usage: evaluate "the paper's row" [flags of infer.py for the teacher]
evaluate() {
    local paper=$1 inception=()
    shift
    generate --model "$OUT" --output_dir "$OUT/student"
    generate --model "$TEACHER" "$@" --output_dir "$OUT/teacher"
    if [[ $METRICS == *fid* ]]; then inception=(--inception "$INCEPTION"); fi
    if [ ! -f "$OUT/report.json" ]; then
        python evaluate.py --images "$OUT/student" --reference "$OUT/teacher" --metrics $METRICS "${inception[@]}" \
            --output "$OUT/report.json" --append_to "$TABLE" $EVALUATE
        if [ -n "$paper" ] && ! grep -qxF "$paper" "$TABLE"; then echo "$paper" >> "$TABLE"; fi
    fi
    cat "$TABLE"
}

# Generates the images of $PROMPTS that are not there yet. Usage: generate [flags of infer.py]
generate() {
    accelerate launch "${LAUNCH[@]}" infer.py --prompts_file "$PROMPTS" --num_images_per_prompt "$IMAGES" "$@"
}
