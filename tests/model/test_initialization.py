"""Initialisations read untrained, trained weights do not, and small tensors make no noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from densitylr.model.initialization import check_untrained
from densitylr.model.stages import find_stages


def verdicts(model):
    return {n: check_untrained(s, model) for n, s in find_stages(model).items()}


def assert_untrained(model):
    wrong = {n: v.reason for n, v in verdicts(model).items() if not v.untrained}
    assert not wrong


def only(model):
    (verdict,) = verdicts(model).values()
    return verdict


def linear(change, rows=256, columns=128):
    """A bias-free layer after ``change(weight)``."""
    layer = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        change(layer.weight)
    return layer


def alternating(n):
    """Factors 1.1 and 0.9 in turn: too close for the shape or the spread of the whole to show."""
    return 1 + 0.1 * (-1.0) ** torch.arange(n)


def mlp():
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def train(model, optimizer, steps=100):
    """Ten noisy clusters, a different batch each step."""
    centres = torch.randn(10, 64)
    for _ in range(steps):
        labels = torch.randint(10, (64,))
        loss = functional.cross_entropy(model(centres[labels] + torch.randn(64, 64)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "swin_t"]
)
def test_torchvision_models_read_untrained(name, seed):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(seed)
    assert_untrained(getattr(models, name)(weights=None))


def test_zero_initialised_residuals_read_untrained():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    assert_untrained(models.resnet18(weights=None, zero_init_residual=True))


def test_a_token_drawn_next_to_zero_reads_untrained():
    model = nn.Sequential(nn.Linear(64, 64))
    model.token = nn.Parameter(1e-6 * torch.randn(1, 1, 64))
    assert_untrained(model)
    with torch.no_grad():
        model.token.mul_(1e3).add_(2e-3)
    assert not only(model).untrained


def test_a_truncated_normal_clamped_by_rounding_reads_untrained():
    layer = linear(lambda w: nn.init.normal_(w, std=0.02))
    with torch.no_grad():
        layer.weight[3, 5] = -2.0
    assert_untrained(nn.Sequential(layer))
    with torch.no_grad():
        layer.weight[3, 5] = -1.0  # no initialisation leaves that
    assert not only(nn.Sequential(layer)).untrained


@pytest.mark.parametrize(
    ("std", "columns", "untrained"),
    [
        (0.1, 128, False),  # 2 is 19.9 times the RMS
        (math.sqrt(2 / 210), 210, True),  # and here 20.4 times
        (0.05, 128, True),
        (1.0, 128, True),  # any draw of these may have one
    ],
)
def test_only_a_two_that_is_far_out_is_put_down_to_rounding(std, columns, untrained):
    torch.manual_seed(0)
    layer = linear(lambda w: nn.init.normal_(w, std=std), columns=columns)
    with torch.no_grad():
        layer.weight[3, 5] = 2.0
    verdict = only(nn.Sequential(layer))
    assert verdict.untrained is untrained
    assert untrained or "largest magnitude 2," in verdict.reason


def far(error, of):
    """A normal draw of spread 0.02 whose mean, or spread, is so many standard errors off."""
    layer = linear(lambda w: nn.init.normal_(w, std=0.02))
    n = layer.weight.numel()
    with torch.no_grad():
        weight = layer.weight.double()
        weight = (weight - weight.mean()) * (0.02 / weight.std())
        weight = weight + error * 0.02 / math.sqrt(n) if of == "mean" else weight
        weight = weight * (1 + error / math.sqrt(2 * n)) if of == "spread" else weight
        layer.weight.copy_(weight)
    return layer


@pytest.mark.parametrize("of", ["mean", "spread"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_five_standard_errors_are_allowed(of, sign):
    torch.manual_seed(0)
    assert only(far(4.8 * sign, of)).untrained
    verdict = only(far(5.2 * sign, of))
    assert not verdict.untrained
    assert verdict.reason.startswith(f".weight: {of} ")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(40, 64, 2),
        lambda: nn.GRU(40, 64, bidirectional=True),
        lambda: nn.RNN(40, 64),
        lambda: nn.MultiheadAttention(64, 4, kdim=32, vdim=48, add_bias_kv=True),
        lambda: nn.TransformerEncoderLayer(64, 4, 128),
        lambda: nn.Embedding(500, 64, padding_idx=3),
        lambda: nn.Bilinear(20, 30, 40),
        lambda: nn.ConvTranspose2d(32, 64, 4),
        lambda: nn.Conv2d(64, 64, 3, groups=8),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 128)),
        lambda: nn.Linear(3, 2),
    ],
)
def test_torch_layers_read_untrained(make):
    for seed in range(10):
        torch.manual_seed(seed)
        assert_untrained(nn.Sequential(make()))


INITIALISATIONS = {
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "identity": nn.init.eye_,
    "orthogonal": lambda w: nn.init.orthogonal_(w, gain=math.sqrt(2)),
    "kaiming normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "kaiming uniform": lambda w: nn.init.kaiming_uniform_(w, mode="fan_out", nonlinearity="relu"),
    "xavier normal": nn.init.xavier_normal_,
    "xavier uniform": lambda w: nn.init.xavier_uniform_(w, gain=5 / 3),
    "BERT": lambda w: nn.init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "LeCun truncated": lambda w: nn.init.trunc_normal_(w, a=-2, b=2).div_(0.87962566 * 128**0.5),
    "GPT-2 residual": lambda w: nn.init.normal_(w, std=0.02 / math.sqrt(24)),
    "bfloat16": lambda w: w.copy_(w.bfloat16()),
}


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_customary_initialisations_read_untrained(name):
    for seed in range(10):
        torch.manual_seed(seed)
        assert_untrained(linear(INITIALISATIONS[name]))


def test_small_tensors_raise_no_false_alarms():
    torch.manual_seed(0)
    for rows in (1, 3, 10, 40):
        for columns in (2, 9, 50):
            for _ in range(15):
                for start in (nn.init.kaiming_normal_, nn.init.xavier_uniform_):
                    assert only(linear(start, rows, columns)).untrained


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda w: nn.init.normal_(w, std=0.033), "spread"),
        (lambda w: w.add_(0.01), "mean"),
        (lambda w: nn.init.normal_(w).pow_(3).mul_(0.02), "shape"),
        (lambda w: w[0, 0].fill_(1.01 / math.sqrt(128)), "largest magnitude"),
        (lambda w: nn.init.normal_(w, std=0.02).mul_(alternating(256)[:, None]), "rows"),
        (lambda w: nn.init.normal_(w, std=0.02).mul_(alternating(128)), "columns"),
        (lambda w: w[1, 2].fill_(math.nan), "not finite"),
    ],
)
def test_the_reason_names_the_rule_that_was_broken(change, rule):
    torch.manual_seed(0)
    verdict = only(linear(change))
    assert not verdict.untrained
    assert verdict.reason.split(":")[0].endswith("weight")
    assert rule in verdict.reason


@pytest.mark.parametrize("layer", ["linear", "conv", "gru"])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_multiplied_initialisation_is_a_bad_gain(layer, factor):
    make = {
        "linear": lambda: nn.Linear(64, 64),
        "conv": lambda: nn.Conv2d(8, 16, 3),
        "gru": lambda: nn.GRU(16, 32),
    }[layer]
    for seed in range(5):
        torch.manual_seed(seed)
        module = make()
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(factor if p.ndim > 1 else 1.0)
        verdict = only(nn.Sequential(module))
        assert verdict.bad_gain
        assert not verdict.untrained
        assert "times that of the nearest usual initialisation" in verdict.reason


@pytest.mark.parametrize("seed", range(5))
def test_a_small_gain_is_bad_though_the_fan_out_is_large(seed):
    """torch's default goes by the fan-in; by the fan-out it would be next to this spread."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(1, 12, 3)
    nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(0.01)
    assert only(nn.Sequential(layer)).bad_gain


@pytest.mark.parametrize(("std", "bad"), [(1.0, False), (1.2, False), (2.0, True), (100.0, True)])
def test_an_embedding_has_no_fan_that_would_explain_a_large_spread(std, bad):
    torch.manual_seed(0)
    layer = nn.Embedding(50, 40)
    with torch.no_grad():
        layer.weight.mul_(std)
    verdict = only(nn.Sequential(layer))
    assert verdict.bad_gain is bad
    assert verdict.untrained is (std == 1)


@pytest.mark.parametrize("limit", [0.05, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("shape", [(5000, 300), (2000, 512), (400, 4096)])
def test_an_embedding_smaller_than_torchs_own_is_no_bad_gain(limit, shape):
    torch.manual_seed(0)
    layer = nn.Embedding(*shape)
    nn.init.uniform_(layer.weight, -limit, limit)
    assert not only(nn.Sequential(layer)).bad_gain


class WithToken(nn.Module):
    def __init__(self, factor, token):
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 4)
        self.token = nn.Parameter(token)
        with torch.no_grad():
            self.patch.weight.mul_(factor)


@pytest.mark.parametrize(
    ("factor", "token", "bad"),
    [
        (100.0, 30.0 * torch.randn(64, generator=torch.Generator().manual_seed(0)), True),
        (100.0, 30.0 * torch.rand(64, generator=torch.Generator().manual_seed(0)), False),
        (1.0, 30.0 * torch.randn(64, generator=torch.Generator().manual_seed(0)), False),
    ],
    ids=["scaled with it", "no draw around zero", "nothing is badly scaled"],
)
def test_a_token_beside_a_bad_gain_may_have_been_scaled_with_it(factor, token, bad):
    torch.manual_seed(0)
    verdict = verdicts(WithToken(factor, token))["patch"]
    assert (verdict.untrained, verdict.bad_gain) == (False, bad)


@pytest.mark.parametrize("std", [0.003, 0.005, 0.033, 0.3])
def test_a_spread_of_ones_own_is_no_bad_gain(std):
    torch.manual_seed(0)
    assert not only(linear(lambda w: nn.init.normal_(w, std=std))).bad_gain


def test_trained_weights_are_no_bad_gain():
    torch.manual_seed(0)
    model = mlp()
    train(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(100.0)
    assert not any(v.bad_gain for v in verdicts(model).values())


def test_a_rank_one_update_that_moves_no_moment_is_seen_in_the_spectrum():
    def spike(weight):
        nn.init.normal_(weight, std=0.02)
        left, right = torch.randn(256).sign(), torch.randn(128).sign()
        weight.add_(torch.outer(left, right), alpha=0.02 * 34 / math.sqrt(256 * 128))
        weight.mul_(0.02 / weight.std())

    torch.manual_seed(0)
    assert "singular value" in only(linear(spike)).reason


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_trained_network_reads_trained(kind):
    torch.manual_seed(0)
    model = mlp()
    assert_untrained(model)
    if kind == "SGD":
        train(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))
    else:
        train(model, torch.optim.Adam(model.parameters(), 1e-3))
    assert not any(v.untrained for v in verdicts(model).values())


def test_a_new_head_on_a_trained_body_is_told_apart():
    torch.manual_seed(0)
    model = mlp()
    train(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))
    model[4] = nn.Linear(256, 10)
    assert [v.untrained for v in verdicts(model).values()] == [False, False, True]


def test_trained_biases_and_norms_give_a_stage_away():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    assert only(model).untrained
    with torch.no_grad():
        model[1].weight.add_(0.03 * torch.randn(64))
    assert only(model).reason.startswith("1.weight: not constant")
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].bias.normal_(std=0.5)
    assert only(model).reason.startswith("0.bias: spread")


@pytest.mark.parametrize("seed", range(5))
def test_a_bias_may_be_normal_only_if_its_weight_is(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256))
    with torch.no_grad():
        model[0].bias.normal_(std=0.05)
    assert only(model).reason.startswith(("0.bias: shape", "0.bias: spread", "0.bias: largest"))
    with torch.no_grad():
        model[0].weight.normal_(std=0.05)
    assert_untrained(model)


def test_a_bias_that_passed_the_limit_of_its_draw_reads_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    nn.init.kaiming_normal_(model[0].weight)
    assert only(model).untrained
    with torch.no_grad():
        model[0].bias[3] = 1.1 / 8
    assert "largest magnitude 0.1375" in only(model).reason


def test_batch_norm_statistics_need_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert only(model).untrained
    model(torch.randn(4, 3, 8, 8))
    (stage,) = find_stages(model).values()
    verdict = check_untrained(stage, nn.DataParallel(model))
    assert not verdict.untrained
    assert verdict.reason == "1: batch norm has seen 1 batches, an initialisation none"
    assert check_untrained(stage).untrained


def test_the_global_random_state_and_the_weights_are_left_alone():
    torch.manual_seed(0)
    model = mlp()
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    verdicts(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
