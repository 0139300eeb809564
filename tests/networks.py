"""A grammar of small networks for Hypothesis: layers that keep samples apart and, in a share of them, one way of mixing.

Every network is float64, so that a wrong gradient cannot hide behind rounding. An activation is ``tokens`` [B, T, C],
``image`` [B, C, H, W] or ``flat`` [B, C]; ``sizes`` leaves the batch out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from mixes import LOSS_MIXES, MIXES
from mixes_with_state import STATEFUL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Draw = Callable[[Any], Any]
Sizes = tuple[int, ...]
ROWS = 6  # rows of made-up data; the example batch is the first four


class Do(nn.Module):
    """One step of a network: ``text`` says what it does, ``function`` does it with the modules it was given."""

    def __init__(self, text: str, function: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.text, self.function = text, function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


@dataclasses.dataclass(frozen=True)
class Network:
    """What was drawn: the model in eval mode, its loss, ``ROWS`` rows, and the way in which samples are mixed, if any."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    data: tuple[Tensor, Tensor]
    text: str
    way: str = ""
    summed: bool = False  # a scalar loss grows with the number of rows

    @property
    def mixes(self) -> bool:
        return bool(self.way)

    def rows(self, index: list[int]) -> tuple[Tensor, Tensor]:
        return self.data[0][index], self.data[1][index]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "softmax(-1)": lambda h: h.softmax(-1),
    "log_softmax(-1)": lambda h: h.log_softmax(-1),
    "relu_": lambda h: (h * 1.0).relu_(),
    "square": lambda h: h * h,
    "abs": torch.abs,
    "exp(-h*h)": lambda h: torch.exp(-h * h),
    "clamp": lambda h: h.clamp(-1.0, 1.0),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "masked_fill": lambda h: h.masked_fill(h < -1.0, -1.0),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "add_": lambda h: (h + 0.5).add_(1.0).mul_(0.5),
    "layer_norm": lambda h: F.layer_norm(h, h.shape[-1:]),
    "softmax over the sample": lambda h: h.flatten(1).softmax(1).view_as(h),
    "minus the sample's mean": lambda h: h - h.flatten(1).mean(1).reshape(-1, *[1] * (h.dim() - 1)),
    "checkpoint": lambda h: checkpoint(torch.tanh, h, use_reentrant=False),
}


def write_first(h: Tensor) -> Tensor:
    h = h * 1.0
    h[:, :1] = h[:, 1:2] * 0.5
    return h


def write_strided(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[..., ::2] = h[..., ::2]
    out[..., 1::2].copy_(2 * h[..., 1::2])
    return out


def write_transposed(h: Tensor) -> Tensor:
    h = h * 1.0
    h.transpose(1, -1).mul_(0.5)
    return h


# Shape-preserving ways of touching the axes behind the batch; every one works on [B, N, ..].
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(1, 1),
    "cumsum": lambda h: h.cumsum(1),
    "sort": lambda h: h.sort(1).values,
    "flatten and back": lambda h: h.flatten(1).reshape(h.shape),
    "transpose and back": lambda h: (h.transpose(1, -1).contiguous() * 2).transpose(1, -1),
    "cut and join": lambda h: torch.cat([h[:, 1:], h[:, :1]], 1),
    "unbind and stack": lambda h: torch.stack(h.unbind(1)[::-1], 1),
    "pad and cut": lambda h: F.pad(h, (1, 1))[..., 2:],
    "gather": lambda h: h.gather(1, h.argsort(1)),
    "index": lambda h: h[:, torch.arange(h.shape[1] - 1, -1, -1)],
    "expand": lambda h: h + h[:, :1].expand_as(h),
    "write_first": write_first,
    "write_strided": write_strided,
    "write_transposed": write_transposed,
    "max": lambda h: h - h.amax(1, keepdim=True),
    "logsumexp": lambda h: h - h.logsumexp(1, keepdim=True),
    "topk": lambda h: h + h.topk(2, 1).values[:, :1],
    "std": lambda h: h / (1.0 + h.std(1, keepdim=True)),
    "batch to the end and back": lambda h: (h.movedim(0, -1) * 2).movedim(-1, 0),
    "row by row": lambda h: torch.cat([torch.tanh(h[i : i + 1]) for i in range(h.shape[0])]),
    "times an identity of the batch's size": lambda h: (torch.eye(h.shape[0]).to(h) @ h.flatten(1)).reshape(h.shape),
}

def _simple(draw: Draw, table: dict[str, Callable[[Tensor], Tensor]]) -> Do:
    name = draw(st.sampled_from(sorted(table)))
    function = table[name]
    return Do(name, lambda m, h: function(h))


def mix(way: str, sizes: Sizes) -> Do:
    """The layer that mixes samples in this way, for activations of these sizes."""
    if way in STATEFUL:
        return Do(way, lambda m, h: m.of(h), of=STATEFUL[way](sizes))
    return Do(way, lambda m, h: MIXES[way](h))


def linear(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    width, bias = draw(st.sampled_from([4, 6])), draw(st.booleans())
    layer: nn.Module = nn.Linear(sizes[-1], width, bias)
    kind = draw(st.sampled_from(["linear", "linear", "linear", "weight_norm", "spectral_norm", "einsum", "matmul"]))
    if kind == "weight_norm":
        layer = torch.nn.utils.parametrizations.weight_norm(layer)
    if kind == "spectral_norm":
        layer = torch.nn.utils.parametrizations.spectral_norm(layer)
    if kind == "einsum":
        return Do("einsum", lambda m, h: torch.einsum("b...i,oi->b...o", h, m.of.weight), of=layer), (
            *sizes[:-1],
            width,
        )
    if kind == "matmul":
        return Do(
            "matmul", lambda m, h: h @ m.of.weight.T + 0.5 * m.shift, of=layer, shift=nn.Parameter(torch.randn(width))
        ), (
            *sizes[:-1],
            width,
        )
    return Do(f"{kind}({sizes[-1]}, {width}, bias={bias})", lambda m, h: m.of(h), of=layer), (*sizes[:-1], width)


def shared(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    layer = nn.Linear(sizes[-1], sizes[-1])
    return Do("one linear twice", lambda m, h: m.of(torch.tanh(m.of(h))), of=layer), sizes


def parameter(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    shape = draw(st.sampled_from([sizes[-1:], sizes[-2:], (1, *sizes)]))
    way = draw(st.sampled_from(["add", "scaled", "sliced", "where", "multiplied"]))
    ways: dict[str, Callable[..., Tensor]] = {
        "add": lambda m, h: h + m.free,
        "scaled": lambda m, h: h + 2.0 * m.free,
        "sliced": lambda m, h: torch.cat([h[..., :2] + m.free[..., :2], h[..., 2:]], -1),
        "where": lambda m, h: torch.where(h > 0, h + m.free, h),
        "multiplied": lambda m, h: h * m.free,
    }
    return Do(f"free {shape} {way}", ways[way], free=nn.Parameter(torch.randn(shape))), sizes


def layer_norm(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    shape = draw(st.sampled_from([sizes[-1:], sizes]))
    affine, bias = draw(st.booleans()), draw(st.booleans())
    return Do(
        f"LayerNorm({shape}, {affine}, bias={bias})", lambda m, h: m.of(h), of=nn.LayerNorm(shape, 1e-3, affine, bias)
    ), sizes


def rms_norm(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return Do("RMSNorm", lambda m, h: m.of(h), of=nn.RMSNorm(sizes[-1], 1e-3)), sizes


def bilinear(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return Do("Bilinear", lambda m, h: m.of(h, torch.tanh(h)), of=nn.Bilinear(sizes[-1], sizes[-1], 4)), (
        *sizes[:-1],
        4,
    )


def attention(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    t, c = sizes
    kind = draw(st.sampled_from(["nn.MultiheadAttention", "sdpa", "by hand", "TransformerEncoderLayer"]))
    if kind == "nn.MultiheadAttention":
        of: nn.Module = nn.MultiheadAttention(c, 2, bias=draw(st.booleans()), batch_first=True)
        return Do(kind, lambda m, h: m.of(h, h, h, need_weights=False)[0], of=of), sizes
    if kind == "TransformerEncoderLayer":
        first = draw(st.booleans())
        of = nn.TransformerEncoderLayer(c, 2, 8, 0.0, batch_first=True, norm_first=first)
        return Do(f"{kind}(norm_first={first})", lambda m, h: m.of(h), of=of), sizes
    causal = draw(st.booleans())

    def run(m: Any, h: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in m.of(h).chunk(3, -1))
        if kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            scores = q @ k.transpose(-1, -2) + m.table
            if causal:
                scores = scores.masked_fill(torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1), -1e9)
            y = scores.softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)

    table = nn.Parameter(torch.randn(2, t, t))
    return Do(f"attention {kind}, causal={causal}", run, of=nn.Linear(c, 3 * c), table=table), sizes


def conv1d(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    c = sizes[1]
    groups, bias = draw(st.sampled_from([1, 2])), draw(st.booleans())
    of = nn.Conv1d(c, c, 3, padding=1, groups=groups, bias=bias)
    return Do(
        f"Conv1d(groups={groups}, bias={bias})", lambda m, h: m.of(h.transpose(1, 2)).transpose(1, 2), of=of
    ), sizes


def recurrent(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    of = getattr(nn, kind)(sizes[-1], 4, batch_first=True)
    return Do(kind, lambda m, h: m.of(h)[0], of=of), (sizes[0], 4)


def slice_tokens(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    t, c = sizes
    cut = draw(st.sampled_from(["[:, 1:]", "[:, ::2]", "[:, :-1]"]))
    cuts: dict[str, Callable[..., Tensor]] = {
        "[:, 1:]": lambda m, h: h[:, 1:],
        "[:, ::2]": lambda m, h: h[:, ::2],
        "[:, :-1]": lambda m, h: h[:, :-1],
    }
    return (
        (Do(cut, cuts[cut]), ((t + 1) // 2 if "::2" in cut else t - 1, c))
        if t > 3
        else (Do("as is", lambda m, h: h), sizes)
    )


def reduce_tokens(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    ways: dict[str, Callable[..., Tensor]] = {
        "mean(1)": lambda m, h: h.mean(1),
        "amax(1)": lambda m, h: h.amax(1),
        "max(1)": lambda m, h: h.max(1).values,
        "sum(1)": lambda m, h: h.sum(1),
        "logsumexp(1)": lambda m, h: h.logsumexp(1),
        "[:, 0]": lambda m, h: h[:, 0],
        "[:, -1]": lambda m, h: h[:, -1],
        "prod(1)": lambda m, h: h.prod(1),
        "var(1)": lambda m, h: h.var(1),
        "pool1d": lambda m, h: F.adaptive_avg_pool1d(h.transpose(1, 2), 1)[..., 0],
    }
    way = draw(st.sampled_from(sorted(ways)))
    return Do(way, ways[way]), sizes[-1:]


def flatten_tokens(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return Do("flatten", lambda m, h: h.flatten(1)), (sizes[0] * sizes[1],)


def conv2d(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    c, height, width = sizes
    kind = draw(st.sampled_from(["same", "stride", "depthwise", "transposed", "pointwise"]))
    bias = draw(st.booleans())
    if kind == "stride" and height >= 4:
        return Do("Conv2d stride 2", lambda m, h: m.of(h), of=nn.Conv2d(c, 4, 3, 2, 1, bias=bias)), (
            4,
            (height + 1) // 2,
            (width + 1) // 2,
        )
    if kind == "transposed" and height <= 4:
        return Do("ConvTranspose2d", lambda m, h: m.of(h), of=nn.ConvTranspose2d(c, 4, 2, 2, bias=bias)), (
            4,
            2 * height,
            2 * width,
        )
    if kind == "depthwise":
        return Do("depthwise", lambda m, h: m.of(h), of=nn.Conv2d(c, c, 3, padding=1, groups=c, bias=bias)), sizes
    if kind == "pointwise":
        return Do("pointwise", lambda m, h: m.of(h), of=nn.Conv2d(c, 4, 1, bias=bias)), (4, height, width)
    mode = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    of = nn.Conv2d(c, 4, 3, padding=1, padding_mode=mode, bias=bias)
    return Do(f"Conv2d(bias={bias}, {mode})", lambda m, h: m.of(h), of=of), (4, height, width)


def image_norm(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    c = sizes[0]
    kind = draw(st.sampled_from(["BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm"]))
    if kind == "BatchNorm2d":
        norm = nn.BatchNorm2d(c)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
        return Do(kind, lambda m, h: m.of(h), of=norm), sizes
    of = {
        "GroupNorm": nn.GroupNorm(2, c, 1e-3),
        "InstanceNorm2d": nn.InstanceNorm2d(c, 1e-2, affine=True),
        "LayerNorm": nn.LayerNorm(sizes, 1e-3),
    }
    return Do(kind, lambda m, h: m.of(h), of=of[kind]), sizes


def pool2d(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    c, height, width = sizes
    if height < 4:
        return Do("Upsample", lambda m, h: F.interpolate(h, scale_factor=2.0, mode="nearest")), (
            c,
            2 * height,
            2 * width,
        )
    kind = draw(st.sampled_from(["max", "avg", "bilinear", "adaptive avg"]))
    ways: dict[str, Callable[..., Tensor]] = {
        "max": lambda m, h: F.max_pool2d(h, 2),
        "avg": lambda m, h: F.avg_pool2d(h, 2),
        "bilinear": lambda m, h: F.interpolate(h, size=(height // 2, width // 2), mode="bilinear"),
        "adaptive avg": lambda m, h: F.adaptive_avg_pool2d(h, (height // 2, width // 2)),
    }
    return Do(f"{kind} pool", ways[kind]), (c, height // 2, width // 2)


def squeeze_excite(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return Do(
        "squeeze-excite",
        lambda m, h: h * torch.sigmoid(m.of(h.mean((2, 3))))[:, :, None, None],
        of=nn.Linear(sizes[0], sizes[0]),
    ), sizes


def image_to_tokens(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return Do("to tokens", lambda m, h: h.flatten(2).transpose(1, 2)), (sizes[1] * sizes[2], sizes[0])


def global_pool(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    kind = draw(st.sampled_from(["mean", "amax", "adaptive"]))
    ways: dict[str, Callable[..., Tensor]] = {
        "mean": lambda m, h: h.mean((2, 3)),
        "amax": lambda m, h: h.amax((2, 3)),
        "adaptive": lambda m, h: F.adaptive_avg_pool2d(h, 1).flatten(1),
    }
    return Do(f"global {kind}", ways[kind]), sizes[:1]


def flat_norm(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    norm = nn.BatchNorm1d(sizes[0])
    assert norm.running_mean is not None
    norm.running_mean.normal_(std=0.1)
    return Do("BatchNorm1d", lambda m, h: m.of(h), of=norm), sizes


def outer(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return Do("outer", lambda m, h: torch.einsum("bi,bj->bij", h, h).flatten(1)[:, : sizes[0]]), sizes


def activation(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return _simple(draw, ACTIVATIONS), sizes


def move(draw: Draw, sizes: Sizes) -> tuple[Do, Sizes]:
    return _simple(draw, MOVES), sizes


Builder = Callable[[Draw, Sizes], tuple[Do, Sizes]]
ANY: list[Builder] = [activation, activation, move, move, layer_norm, parameter]
LAYERS: dict[str, list[Builder]] = {
    "tokens": [*ANY, linear, linear, shared, rms_norm, bilinear, attention, attention, conv1d, recurrent, slice_tokens],
    "image": [*ANY, conv2d, conv2d, conv2d, image_norm, image_norm, pool2d, squeeze_excite],
    "flat": [*ANY, linear, linear, shared, rms_norm, flat_norm, outer, bilinear],
}
EXITS: dict[str, list[Builder]] = {
    "tokens": [reduce_tokens, reduce_tokens, flatten_tokens],
    "image": [global_pool, image_to_tokens],
}


def _residual(draw: Draw, kind: str, sizes: Sizes, mixing: Do | None = None) -> Do:
    keeping: dict[str, list[Builder]] = {
        "tokens": [shared, attention, conv1d, layer_norm, activation],
        "image": [squeeze_excite, image_norm, activation],
        "flat": [shared, flat_norm, activation],
    }
    inner = [draw(st.sampled_from(keeping[kind]))(draw, sizes)[0] for _ in range(draw(st.integers(1, 2)))]
    if mixing is not None:
        inner.insert(draw(st.integers(0, len(inner))), mixing)
    return Do(f"residual[{', '.join(x.text for x in inner)}]", lambda m, h: h + m.inner(h), inner=nn.Sequential(*inner))


@st.composite
def networks(draw: Draw, mixing: float = 0.2) -> Network:
    """A network of two to six layers, its head, its loss and its data; ``mixing`` is the share that mixes samples.

    The mix is a layer, or within a residual, or in the loss.
    """
    torch.manual_seed(draw(st.integers(0, 10_000)))
    entry = draw(st.sampled_from(["ids", "tokens", "image", "flat"]))
    layers: list[Do] = []
    kind, sizes = {
        "ids": ("tokens", (5, 4)),
        "tokens": ("tokens", (4, 6)),
        "image": ("image", (4, 4, 4)),
        "flat": ("flat", (6,)),
    }[entry]
    if entry == "ids":
        x: Tensor = torch.randint(0, 9, (ROWS, 5))
        layers.append(
            Do("Embedding", lambda m, h: m.of(h), of=nn.Embedding(9, 4, padding_idx=draw(st.sampled_from([None, 0]))))
        )
    else:
        x = torch.randn(ROWS, *sizes, dtype=torch.float64)
    place = way = ""
    if draw(st.sampled_from(range(20))) >= 20 - round(20 * mixing):
        place = draw(st.sampled_from(["layer", "layer", "residual", "loss"]))
        way = draw(st.sampled_from(sorted(LOSS_MIXES if place == "loss" else {**MIXES, **STATEFUL})))
    count = draw(st.integers(1, 4))
    at = draw(st.integers(0, count - 1)) if place in ("layer", "residual") else -1
    for i in range(count):
        if i == at and place == "layer":
            layers.append(mix(way, sizes))
        if i == at and place == "residual":
            layers.append(_residual(draw, kind, sizes, mix(way, sizes)))
            continue
        if draw(st.integers(0, 3)) == 3:
            layers.append(_residual(draw, kind, sizes))
            continue
        layer, sizes = draw(st.sampled_from(LAYERS[kind]))(draw, sizes)
        layers.append(layer)
    while kind != "flat":
        layer, sizes = draw(st.sampled_from(EXITS[kind]))(draw, sizes)
        kind = "tokens" if len(sizes) == 2 else "flat"
        layers.append(layer)
    layers.append(Do("head", lambda m, h: m.of(h), of=nn.Linear(sizes[0], 3)))
    reduction = draw(st.sampled_from(["none", "none", "mean", "sum"]))
    summed = LOSS_MIXES[way][1] if place == "loss" else reduction == "sum"

    def loss(model: Any, batch: Any) -> Tensor:
        if place != "loss":
            return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)
        logits = model(batch[0])
        return LOSS_MIXES[way][0](F.cross_entropy(logits, batch[1], reduction="none"), logits, batch[1])

    name = way if place == "loss" else f"cross_entropy({reduction})"
    text = f"{entry} -> {' -> '.join(x.text for x in layers)}; {name}"
    model = nn.Sequential(*layers).double().eval()
    return Network(model, loss, (x, torch.randint(0, 3, (ROWS,))), text, way, summed)
