"""The lab's checks of a user's layers and optimizers: right ones pass, and each mistake gets only its own message."""

import numpy as np
import pytest
import torch
from torch import nn

import dlkit
from dlkit.lab import checks


def messages(**given):
    return checks.run(show=None, **given).messages


# Right implementations.


@pytest.mark.parametrize("home", [torch.nn, dlkit.nn], ids=["torch", "dlkit"])
def test_layers_of_torch_and_dlkit_are_right(home):
    shown: list[str] = []
    report = checks.run(BatchNorm=home.BatchNorm1d, LayerNorm=home.LayerNorm, Dropout=home.Dropout, show=shown.append)
    assert report.messages == []
    assert report.ok
    assert len(report.findings) >= 14
    assert shown == [str(report)]
    assert shown[0].endswith("All right.")


@pytest.mark.parametrize("home", [torch.optim, dlkit.optim], ids=["torch", "dlkit"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_optimizers_of_torch_and_dlkit_are_right(home, name):
    assert messages(optimizer=getattr(home, name)) == []


# Norms written by hand, one in NumPy with its own backward, one in torch. Each mistake is an option of these two.


def fraction(x, mean, var, eps, place):
    if place == "outside":
        return (x - mean) / (var**0.5 + eps)
    if place == "variance":
        return (x - mean) / (var + eps)
    return (x - mean) / (var + (eps if place == "inside" else 0)) ** 0.5


def numpy_batch_norm(
    *, ddof=0, place="inside", axis=0, direction="new", running_ddof=1, running_start=1.0, updates="training",
    evaluation="running", backward="right", affine="both", one_pass=False, centred=True, training_uses="batch",
):  # fmt: skip
    class BatchNorm:
        def __init__(self, num_features, eps=1e-5, momentum=0.1):
            self.gamma, self.beta = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
            self.running_mean = np.zeros(num_features)
            self.running_var = np.full(num_features, running_start)
            self.eps, self.momentum, self.training = eps, momentum, True

        def __call__(self, x):
            mean, var = x.mean(axis, keepdims=True), x.var(axis, ddof=ddof, keepdims=True)
            if one_pass:
                var = np.maximum((x * x).mean(axis, keepdims=True) - mean**2, 0)
            if updates == "always" or (self.training and updates == "training"):
                for name, new in (("running_mean", x.mean(0)), ("running_var", x.var(0, ddof=running_ddof))):
                    part = self.momentum if direction == "new" else 1 - self.momentum
                    setattr(self, name, (1 - part) * getattr(self, name) + part * new)
            by_batch = (training_uses if self.training else evaluation) == "batch"
            if not by_batch:
                mean, var = self.running_mean, self.running_var
            self.x_hat = fraction(x, mean if centred else 0, var, self.eps, place)
            self.rstd = (var + self.eps) ** -0.5
            if affine == "none":
                return self.x_hat
            if affine == "swapped":
                return (self.x_hat + self.beta) * self.gamma
            return self.x_hat * self.gamma + (self.beta if affine == "both" else 0)

        def backward(self, g):
            g = g * (self.gamma if backward != "unscaled" else 1)
            result = g
            if backward in ("right", "mean", "unscaled"):
                result = result - g.mean(0)
            if backward in ("right", "variance", "unscaled"):
                result = result - self.x_hat * (g * self.x_hat).mean(0)
            return result * self.rstd

    return BatchNorm


def torch_layer_norm(*, ddof=0, place="inside", axis=-1, affine=True, detached=False):
    class LayerNorm(nn.Module):
        def __init__(self, size, eps=1e-5):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
            self.eps = eps

        def forward(self, x):
            mean, var = x.mean(axis, keepdim=True), x.var(axis, correction=ddof, keepdim=True)
            if detached:
                mean, var = mean.detach(), var.detach()
            y = fraction(x, mean, var, self.eps, place)
            return y * self.weight + self.bias if affine else y

    return LayerNorm


UNBIASED = "the variance is the unbiased one, divided by n - 1; normalization divides by n"
OUTSIDE = "eps is added to the standard deviation; it belongs inside the root: sqrt(var + eps)"
NO_EPS = "eps is not used: a constant input would be divided by 0"

BATCH_NORMS = {
    UNBIASED: {"ddof": 1},
    OUTSIDE: {"place": "outside"},
    NO_EPS: {"place": "none"},
    "divides by the variance; it should be by its square root": {"place": "variance"},
    "the mean is not subtracted": {"centred": False},
    "normalizes each sample over its features (that is LayerNorm); it should be over the batch, axis 0": {"axis": 1},
    "normalizes over the whole array; it should be over the batch, axis 0, each feature by itself": {"axis": None},
    "weight and bias are not applied": {"affine": "none"},
    "the bias is not added": {"affine": "weight"},
    "the bias is added before the weight multiplies; it should be after: x * weight + bias": {"affine": "swapped"},
    "momentum is the wrong way round: torch's is the part of the new value, running = (1 - momentum) * running + "
    "momentum * batch": {"direction": "old"},
    "running_var takes the biased variance; torch puts the unbiased one there, divided by n - 1": {"running_ddof": 0},
    "running_var begins at 0; it should begin at 1": {"running_start": 0.0},
    "training does not update the running statistics": {"updates": "never"},
    "evaluation changes the running statistics": {"updates": "always"},
    "evaluation normalizes by the batch; it should be by the running statistics": {"evaluation": "batch"},
    "training normalizes by the running statistics; it should be by those of the batch": {
        "training_uses": "running", "updates": "never",
    },
    "the gradient takes mean and variance as constants; both depend on the input": {"backward": "constant"},
    "the gradient takes the variance as a constant; it depends on the input": {"backward": "mean"},
    "the gradient takes the mean as a constant; it depends on the input": {"backward": "variance"},
    "the gradient of the input lacks the factor weight": {"backward": "unscaled"},
    "loses its digits where the mean is large: the variance is to be the mean of (x - mean)^2; E[x^2] - E[x]^2 "
    "cancels": {"one_pass": True},
}  # fmt: skip


def test_a_batch_norm_by_hand_is_right():
    assert messages(BatchNorm=numpy_batch_norm()) == []


@pytest.mark.parametrize("message", BATCH_NORMS)
def test_batch_norm(message):
    expected = [f"BatchNorm: {message}"]
    if "training normalizes by the running" in message:
        expected.append("BatchNorm: training does not update the running statistics")
    assert messages(BatchNorm=numpy_batch_norm(**BATCH_NORMS[message])) == expected


def test_two_mistakes_are_told_apart():
    got = messages(BatchNorm=numpy_batch_norm(ddof=1, place="outside", direction="old", running_ddof=0))
    assert len(got) == 4
    assert [UNBIASED in got[0], OUTSIDE in got[1], "wrong way round" in got[2], "biased variance" in got[3]] == [
        True
    ] * 4


LAYER_NORMS = {
    UNBIASED: {"ddof": 1},
    OUTSIDE: {"place": "outside"},
    NO_EPS: {"place": "none"},
    "weight and bias are not applied": {"affine": False},
    "normalizes over the batch (axis 0); it should be over the last axis, each sample by itself": {"axis": 0},
    "normalizes over the whole array; it should be over the last axis, each sample by itself": {"axis": (0, 1)},
    "normalizes over axis 1; it should be the last axis, whatever the number of axes": {"axis": 1},
    "the gradient takes mean and variance as constants; both depend on the input": {"detached": True},
}


def test_a_layer_norm_by_hand_is_right():
    assert messages(LayerNorm=torch_layer_norm()) == []


@pytest.mark.parametrize("message", LAYER_NORMS)
def test_layer_norm(message):
    assert messages(LayerNorm=torch_layer_norm(**LAYER_NORMS[message])) == [f"LayerNorm: {message}"]


def test_layer_norm_of_a_well_known_tutorial():
    class LayerNorm(nn.Module):
        def __init__(self, features, eps=1e-6):
            super().__init__()
            self.a_2, self.b_2, self.eps = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features)), eps

        def forward(self, x):
            return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.b_2

    got = messages(LayerNorm=LayerNorm)
    assert got == [
        "LayerNorm: has no array `weight` (or `gamma`)",
        "LayerNorm: has no array `bias` (or `beta`)",
        f"LayerNorm: {UNBIASED}",
        f"LayerNorm: {OUTSIDE}",
    ]


# Dropout.


class Dropout:
    """A right dropout; each mistake is a subclass."""

    def __init__(self, p=0.5):
        self.p, self.training = p, True

    def mask(self, x):
        return np.random.default_rng().random(x.shape) >= self.p

    def drop(self, x):
        self.kept = self.mask(x)
        return x * self.kept / (1 - self.p) if self.p < 1 else 0 * x

    def __call__(self, x):
        return self.drop(x) if self.training else x

    def backward(self, g):
        return g * self.kept / (1 - self.p)


class NoRescaling(Dropout):
    def drop(self, x):
        self.kept = self.mask(x)
        return x * self.kept


class RescaledInEvaluation(NoRescaling):
    def __call__(self, x):
        return self.drop(x) if self.training else x * (1 - self.p)


class AlwaysActive(Dropout):
    def __call__(self, x):
        return self.drop(x)


class WrongWayRound(Dropout):
    def __call__(self, x):
        return x if self.training else self.drop(x)


class Nothing(Dropout):
    def __call__(self, x):
        return x


class KeepProbability(Dropout):
    def drop(self, x):
        self.kept = np.random.default_rng().random(x.shape) < self.p
        return x * self.kept / self.p


class Multiplies(Dropout):
    def drop(self, x):
        self.kept = self.mask(x)
        return x * self.kept * (1 - self.p)


class DividesByP(Dropout):
    def drop(self, x):
        self.kept = self.mask(x)
        return x * self.kept / self.p


class SameMask(Dropout):
    def mask(self, x):
        return np.random.default_rng(0).random(x.shape) >= self.p


class OneRow(Dropout):
    def mask(self, x):
        return np.broadcast_to(np.random.default_rng().random(x.shape[1]) >= self.p, x.shape)


class GradientUnmasked(Dropout):
    def backward(self, g):
        return g / (1 - self.p)


class GradientUnscaled(Dropout):
    def backward(self, g):
        return g * self.kept


class NanAtOne(Dropout):
    def drop(self, x):
        self.kept = self.mask(x)
        return np.float32(1) * x * self.kept / np.float64(1 - self.p)


class InPlace(Dropout):
    def drop(self, x):
        self.kept = self.mask(x)
        x *= self.kept
        x /= 1 - self.p
        return x


class ChangesEvaluation(Dropout):
    def __call__(self, x):
        return self.drop(x) if self.training else 2 * x


DROPOUTS = {
    NoRescaling: "the rescaling is missing: what is kept is to be divided by 1 - p, so that the mean stays",
    RescaledInEvaluation: "rescales in evaluation (times 1 - p); torch does it in training (divided by 1 - p), and "
    "evaluation is the identity",
    AlwaysActive: "is active in evaluation; there it should return its input",
    WrongWayRound: "training and evaluation are the wrong way round: it drops in evaluation and not in training",
    Nothing: "training leaves the input as it is: nothing is dropped",
    KeepProbability: "p is taken as the probability to keep; it is the probability to drop",
    Multiplies: "multiplies what is kept by 1 - p; it should be divided by it",
    DividesByP: "divides what is kept by p; it should be by 1 - p",
    SameMask: "every call drops the same elements: a mask is to be drawn anew at each call",
    OneRow: "one mask serves the whole batch: each element is to be drawn by itself",
    GradientUnmasked: "the gradient is not masked: it is 0 where the element was dropped",
    GradientUnscaled: "the gradient lacks the factor 1 / (1 - p)",
    NanAtOne: "p = 1 gives NaN: 1 / (1 - p) is infinite there; return zeros",
    InPlace: "changes its input in place",
    ChangesEvaluation: "evaluation changes the input; it should return it as it is",
}


def test_a_dropout_by_hand_is_right():
    assert messages(Dropout=Dropout) == []


@pytest.mark.parametrize("wrong", DROPOUTS)
def test_dropout(wrong):
    if wrong is OneRow:
        # In one row of 100 draws a share within 0.02 of 0.3 is luck.
        assert f"Dropout: {DROPOUTS[wrong]}" in messages(Dropout=wrong)
    else:
        assert messages(Dropout=wrong) == [f"Dropout: {DROPOUTS[wrong]}"]


def test_dropout_of_torch_tensors_with_training_as_an_argument():
    class Mine:
        def __init__(self, rate):
            self.rate = rate

        def forward(self, x, training=True):
            if not training or self.rate == 0:
                return x
            if self.rate == 1:
                return torch.zeros_like(x)
            return x * (torch.rand(x.shape) > self.rate) / (1 - self.rate)

    assert messages(Dropout=Mine) == []


def test_dropout_without_modes():
    class Mine:
        def __init__(self, p):
            self.p = p

        def __call__(self, x):
            return x * (np.random.default_rng().random(x.shape) >= self.p) / max(1 - self.p, 1e-30)

    assert messages(Dropout=Mine) == [
        "Dropout: has no train() and eval(), no `training`, and takes no training=: its two modes cannot be told apart"
    ]


# Optimizers. The mistakes are options of one step, which shows each beside the right code.


def adam(
    *, name="Adam", decoupled=False, corrections=(1, 1), eps_at="outside", square=True, root=True, blend=True, sign=-1,
    shared=False, late=0, decays="right", swapped=False, counts="step",
):  # fmt: skip
    class Mine:
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
            self.params, self.lr, self.betas, self.eps, self.weight_decay = list(params), lr, betas, eps, weight_decay
            self.m = [torch.zeros_like(p) for p in self.params]
            self.v = [torch.zeros_like(p) for p in self.params]
            self.t = late

        @torch.no_grad()
        def step(self):
            self.t += 1
            b1, b2 = self.betas[::-1] if swapped else self.betas
            for i, p in enumerate(self.params):
                if p.grad is None:
                    continue
                if counts == "call" and i:
                    self.t += 1
                g = p.grad
                if decays == "right":
                    if decoupled:
                        p -= self.lr * self.weight_decay * p
                    else:
                        g = g + self.weight_decay * p
                if decays == "without lr":
                    p -= self.weight_decay * p
                m, v = (self.m[0], self.v[0]) if shared and self.m[0].shape == p.shape else (self.m[i], self.v[i])
                m.mul_(b1).add_(g * ((1 - b1) if blend else 1))
                v.mul_(b2).add_((1 - b2) * (g * g if square else g.abs()))
                c1 = 1 - b1**self.t if corrections[0] else 1
                c2 = 1 - b2**self.t if corrections[1] else 1
                if not root:
                    scale = v / c2 + self.eps
                elif eps_at == "outside":
                    scale = (v / c2).sqrt() + self.eps
                elif eps_at == "inside":
                    scale = (v / c2 + self.eps).sqrt()
                else:
                    scale = (v.sqrt() + self.eps) / c2**0.5
                p += sign * self.lr * (m / c1) / scale
                if decays == "after":
                    p -= self.lr * self.weight_decay * p

    Mine.__name__ = name
    return Mine


def adamw(**mistakes):
    return adam(name="MyAdamW", **{"decoupled": True, **mistakes})


ADAMS = [
    ({"corrections": (0, 0)}, "the bias correction is missing: divide the averages by 1 - beta1^t and 1 - beta2^t"),
    ({"corrections": (1, 0)}, "the second moment lacks its bias correction: divide it by 1 - beta2^t"),
    ({"corrections": (0, 1)}, "the first moment lacks its bias correction: divide it by 1 - beta1^t"),
    ({"eps_at": "inside"}, "eps is inside the root; Adam adds it to the root: sqrt(v) + eps"),
    ({"eps_at": "before"}, "eps is added to the root before its bias correction; it belongs after: sqrt(v_hat) + eps"),
    ({"square": False}, "the second moment averages |g|; it should be of g^2"),
    ({"root": False}, "divides by the second moment; it should be by its square root"),
    ({"blend": False}, "the first moment adds g; it should be (1 - beta1) * g"),
    ({"sign": 1}, "adds the step; it should be subtracted, to go downhill"),
    ({"decays": "none"}, "weight decay is not applied"),
    ({"decays": "without lr"}, "weight decay lacks the factor lr"),
    ({"decays": "after"}, "weight decay is taken of the parameter after its step; it should be of the one before"),
    ({"swapped": True}, "beta1 and beta2 are the wrong way round"),
    ({"late": 1}, "t is 2 in the first step; it should be 1"),
    ({"counts": "call"}, "t counts parameters; it should count steps, once for all parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), ADAMS)
@pytest.mark.parametrize("make", [adam, adamw])
def test_adam_and_adamw(make, mistake, message):
    assert messages(optimizer=make(**mistake)) == [f"{make().__name__}: {message}"]


def test_adam_and_adamw_by_hand_are_right():
    assert messages(optimizer=adam()) == []
    assert messages(optimizer=adamw()) == []


def test_decay_of_the_other_kind():
    assert messages(optimizer=adamw(decoupled=False)) == [
        "MyAdamW: weight decay is coupled (added to the gradient), which is Adam with L2; AdamW's is decoupled"
    ]
    assert messages(optimizer=adam(decoupled=True)) == [
        "Adam: weight decay is decoupled, which is AdamW; Adam's is added to the gradient"
    ]
    assert messages(optimizer=adam(decoupled=True), rule="adamw") == []


def test_three_mistakes_at_once():
    got = messages(optimizer=adamw(decoupled=False, corrections=(0, 0), eps_at="inside"))
    assert len(got) == 3


class NumpySGD:
    """Changes lists of arrays in place."""

    nesterov, damped, decoupled, shared, decays, no_momentum = False, False, False, False, True, False

    def __init__(self, learning_rate=0.1, momentum=0.0, weight_decay=0.0):
        self.lr, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.v = None

    def step(self, params, grads):
        if self.v is None:
            self.v = [np.zeros_like(p) for p in params]
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if self.decoupled:
                p -= self.lr * self.weight_decay * p
            elif self.decays:
                g = g + self.weight_decay * p
            self.v[i] = self.momentum * self.v[i] + ((1 - self.momentum) * g if self.damped else g)
            if self.shared:
                self.v = [np.resize(self.v[i], each.shape) for each in params]
            p -= self.lr * (g + self.momentum * self.v[i] if self.nesterov else g if self.no_momentum else self.v[i])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("nesterov", "the step is Nesterov's, which torch takes with nesterov=True alone"),
        ("damped", "the velocity takes (1 - momentum) * g; torch's takes g: v = momentum * v + g"),
        ("decoupled", "weight decay is decoupled; SGD's is added to the gradient, and so goes through the momentum"),
        (
            "shared",
            "right for one parameter, but not for two: each parameter needs a state (moments, velocity) of its own",
        ),
        ("no_momentum", "momentum is not applied"),
    ],
)
def test_sgd(mistake, message):
    assert messages(optimizer=type("SGD", (NumpySGD,), {mistake: True})) == [f"SGD: {message}"]


def test_sgd_by_hand_is_right():
    assert messages(optimizer=NumpySGD) == []
    assert messages(optimizer=type("SGD", (NumpySGD,), {"decays": False})) == ["SGD: weight decay is not applied"]


def rmsprop(*, reverse=False, total=False, inside=False, corrected=False, ones=False):
    class RMSprop:
        def __init__(self, lr=1e-2, rho=0.99, epsilon=1e-8):
            self.lr, self.rho, self.eps, self.v, self.t = lr, rho, epsilon, {}, 0

        def step(self, params, grads):
            """Returns the new parameters."""
            self.t += 1
            new = []
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                keep, take = (1 - self.rho, self.rho) if reverse else (1, 1) if total else (self.rho, 1 - self.rho)
                self.v[i] = keep * self.v.get(i, np.full_like(p, float(ones))) + take * g**2
                v = self.v[i] / (1 - self.rho**self.t) if corrected else self.v[i]
                new.append(p - self.lr * g / (np.sqrt(v + self.eps) if inside else np.sqrt(v) + self.eps))
            return new

    return RMSprop


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("reverse", "alpha is the wrong way round: v = alpha * v + (1 - alpha) * g^2"),
        ("total", "sums the squares, which is Adagrad; RMSprop averages: v = alpha * v + (1 - alpha) * g^2"),
        ("inside", "eps is inside the root; RMSprop adds it to the root: sqrt(v) + eps"),
        ("corrected", "the average has a bias correction; RMSprop has none"),
        ("ones", "the average begins at 1; it should begin at 0"),
    ],
)
def test_rmsprop(mistake, message):
    assert messages(optimizer=rmsprop()) == []
    assert messages(optimizer=rmsprop(**{mistake: True})) == [f"RMSprop: {message}"]


# Objects that cannot be used at all.


class NoTraining:
    def __init__(self, p):
        pass


class Raises(Dropout):
    def __call__(self, x):
        raise IndexError("out of range")


class ReturnsNothing(Dropout):
    def __call__(self, x):
        return None


class WrongShape(Dropout):
    def __call__(self, x):
        return x[:1]


class NeedsMore(Dropout):
    def __init__(self, p, other):
        pass


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (NoTraining, "cannot be called: it needs __call__ or forward"),
        (Raises, "calling it with an array of shape (200, 100) in training raised IndexError: out of range"),
        (ReturnsNothing, "returns a NoneType, expected an array"),
        (WrongShape, "the output has the shape (1, 100), expected (200, 100)"),
        (NeedsMore, "making it with p=0.3 raised TypeError"),
    ],
)
def test_a_class_that_cannot_be_used(cls, message):
    (got,) = messages(Dropout=cls)
    assert got.startswith(f"Dropout: {message}")


def test_optimizers_that_cannot_be_used():
    class AdamW:
        def __init__(self, params, lr):
            self.params, self.lr = params, lr

        def step(self):
            for p in self.params:
                p -= self.lr * p.grad

    assert messages(optimizer=AdamW) == ["AdamW: takes no weight_decay, which is what AdamW adds to Adam"]
    (got,) = messages(optimizer=AdamW, rule="sgd")
    assert got.startswith("AdamW: taking a step raised RuntimeError: a leaf Variable")
    assert got.endswith("(change parameters under torch.no_grad())")


def test_a_parameter_without_a_gradient_is_left_out():
    class SGD:
        def __init__(self, params, lr=0.1):
            self.params, self.lr = list(params), lr

        @torch.no_grad()
        def step(self):
            for p in self.params:
                p -= self.lr * p.grad

    (got,) = messages(optimizer=SGD)
    assert got.startswith("SGD: a parameter whose grad is None is to be left out; step() raised TypeError")


def test_no_known_mistake():
    class Odd(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 0.01

    (got,) = messages(LayerNorm=Odd)
    assert "no known mistake explains it; the largest difference: expected" in got


def test_what_run_refuses():
    with pytest.raises(ValueError, match="expected at least one of BatchNorm=, LayerNorm=, Dropout=, optimizer="):
        checks.run()
    with pytest.raises(ValueError, match="expected rule to be one of adamw, adam, rmsprop, sgd, got None for Lion"):
        checks.run(optimizer=type("Lion", (), {}))


def test_the_report_has_a_line_for_each_check():
    text = str(checks.run(Dropout=NoRescaling, show=None))
    assert "wrong Dropout: output in training\n      the rescaling is missing" in text
    assert "right Dropout: output in evaluation" in text
    assert text.endswith("1 thing to mend.")
