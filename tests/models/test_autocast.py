"""Weights that are cast once give what autocast's casts in every pass give, to the bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from senseflow.memory.counter import Counter, Work
from senseflow.models import autocast
from senseflow.models.autocast import WeightCopies, cast_frozen_layers
from senseflow.models.discriminator import LatentClassifier


BF16 = torch.bfloat16


class Network(torch.nn.Module):
    """A convolution, a norm, linear layers with gradient checkpointing, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.GroupNorm(2, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + checkpoint(layer, F.gelu(x), use_reentrant=False)
        return x.float()


@pytest.fixture
def networks():
    torch.manual_seed(0)
    network = Network()
    return network, copy.deepcopy(network)


def under_autocast(network, x):
    with torch.autocast("cpu", BF16, cache_enabled=False):
        return network(x)


@pytest.mark.parametrize("group_size", [1, 200, 2**27])
def test_copies_train_to_the_bit_as_autocast_does(group_size, networks, monkeypatch):
    """Two calls to a backward pass, two of these to a step, and a call without gradient between them."""
    monkeypatch.setattr(autocast, "GROUP_SIZE", group_size)
    network, copied = networks
    copies = WeightCopies(copied, list(copied.parameters()), BF16)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True) for net in networks]
    for _ in range(3):
        for _ in range(2):
            x, losses = torch.randn(2, 4, 5, 5), []
            for net in networks:
                outputs = []
                for scale in (1, 2):
                    if net is copied:
                        copies.attach()
                    outputs.append(under_autocast(net, scale * x))
                    with torch.no_grad():
                        assert torch.equal(under_autocast(net, scale * x), outputs[-1])
                losses.append(sum(output.square().mean() for output in outputs))
                losses[-1].backward()
            assert losses[0] == losses[1]
        for (name, weight), other in zip(network.named_parameters(), copied.parameters(), strict=True):
            if name.startswith("unused"):
                assert weight.grad is None and other.grad is None
            else:
                assert weight.grad.abs().sum() > 0 and torch.equal(weight.grad, other.grad), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        copies.detach()
        copies.refresh()
    assert list(copied.state_dict()) == list(network.state_dict())
    # Frozen, with gradient to the input; and without autocast, in float32.
    for call in (under_autocast, lambda net, x: net(x)):
        inputs = [x.clone().requires_grad_() for _ in networks]
        for net, own in zip(networks, inputs):
            call(net.requires_grad_(False), own).square().mean().backward()
        assert torch.equal(*[own.grad for own in inputs])


def work_of(network, x) -> Work:
    with torch.no_grad(), Counter() as counter:
        under_autocast(network, x)
    return sum(counter.work.values(), Work())


def test_nothing_is_cast_in_a_pass(networks):
    network, copied = networks
    cast_frozen_layers(network.requires_grad_(False), BF16)
    copies, x = WeightCopies(copied, list(copied.parameters()), BF16), torch.randn(2, 4, 5, 5)
    assert work_of(copied, x) == work_of(network, x) != work_of(Network(), x)
    assert work_of(Network(), x).operations - work_of(copied, x).operations == 2 * (1 + 3)  # weights and biases
    assert network.norm.weight.dtype == torch.float32 and len(copies.tensors) == 2 * (1 + 3 + 1)


def test_what_runs_without_autocast_has_no_copies():
    network = torch.nn.ModuleList([torch.nn.Linear(3, 3), LatentClassifier(4, 8, 8)])
    copies = WeightCopies(network, list(network.parameters()), BF16)
    assert [tensor.shape for tensor in copies.tensors] == [(3, 3), (3,)]


def test_layers_compile_without_graph_breaks_and_each_graph_once(networks):
    network, copied = networks
    copies = WeightCopies(copied, list(copied.parameters()), BF16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    copied.layers[0].compile(backend=backend, fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5)
        copies.attach()
        assert torch.equal(under_autocast(copied, x), under_autocast(network, x))
        copies.detach()
        with torch.no_grad():
            assert torch.equal(under_autocast(copied, x), under_autocast(network, x))
    assert len(graphs) == 2  # with gradient and without
