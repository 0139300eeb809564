"""Zoo cases from torch.nn and by hand: every kind of layer, and every way of writing one that users have."""
# ruff: noqa: E501
# mypy: disable-error-code="no-any-return, no-untyped-call, arg-type"

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import POOL, Case, cross_entropy

WIDTH = 8


class Net(nn.Module):
    """Named parts and a forward: ``Net(forward, linear=nn.Linear(..), gain=nn.Parameter(..), table=tensor)``."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if type(part) is Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def sandwich(middle: Callable[[Any, Tensor], Tensor], inside: int = WIDTH, outside: int = WIDTH, **parts: Any) -> Net:
    """x [B, 6] -> Linear -> ``middle(net, h [B, inside])`` [B, outside] -> Linear -> [B, 3]: the middle needs a gradient."""
    return Net(
        lambda net, x: net.last(middle(net, net.first(x))),
        first=nn.Linear(6, inside),
        last=nn.Linear(outside, 3),
        **parts,
    )


def images(middle: Callable[[Any, Tensor], Tensor], channels: int = 4, **parts: Any) -> Net:
    """x [B, 3, 8, 8] -> Conv -> ``middle`` -> mean over space -> Linear: h [B, 4, 8, 8] -> [B, ``channels``, .., ..]."""
    return Net(
        lambda net, x: net.last(middle(net, net.first(x)).flatten(2).mean(2)),
        first=nn.Conv2d(3, 4, 3, padding=1),
        last=nn.Linear(channels, 3),
        **parts,
    )


def tokens(middle: Callable[[Any, Tensor], Tensor], **parts: Any) -> Net:
    """x [B, 5, 6] -> Linear -> ``middle(net, h [B, 5, 8])`` -> mean over tokens -> Linear -> [B, 3]."""
    return Net(
        lambda net, x: net.last(middle(net, net.first(x)).mean(1)),
        first=nn.Linear(6, WIDTH),
        last=nn.Linear(WIDTH, 3),
        **parts,
    )


def classify(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(batch["x"]), batch["y"])


def padded(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(batch["x"], batch["padding"]), batch["y"])


# Sequence models


def last_of_length(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """The bidirectional state of each sequence's own last step: what packing would give the forward direction."""
    out, _ = net.rnn(x)
    at = (lengths - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, out.shape[2])
    return net.last(out.gather(1, at).squeeze(1))


def attend(net: Any, x: Tensor, padding: Tensor) -> Tensor:
    h = net.first(x)
    out, weights = net.attention(h, h, h, key_padding_mask=padding)
    return net.last(out.mean(1) + weights.mean((1, 2)).unsqueeze(1))


def attend_fused(net: Any, x: Tensor, padding: Tensor) -> Tensor:
    h = net.first(x).transpose(0, 1)
    out, _ = net.attention(h, h, h, key_padding_mask=padding, need_weights=False)
    return net.last(out.mean(0))


def decode(net: Any, x: Tensor, padding: Tensor) -> Tensor:
    h = net.first(x)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=h.dtype)
    out = net.decoder(h, h.flip(1), tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=True)
    return net.last(out.mean(1))


def translate(net: Any, x: Tensor, padding: Tensor) -> Tensor:
    h = net.first(x)
    return net.last(net.transformer(h, h[:, :3], src_key_padding_mask=padding, memory_key_padding_mask=padding).mean(1))


def mix(net: Any, h: Tensor) -> Tensor:
    h = h + net.across(net.norm1(h).transpose(1, 2)).transpose(1, 2)
    return h + net.along(net.norm2(h))


def wavenet(net: Any, x: Tensor) -> Tensor:
    h, skip = net.first(x.transpose(1, 2)), 0.0
    for filters, out in zip(net.filters, net.outs, strict=True):
        a, b = filters(F.pad(h, (filters.dilation[0], 0))).chunk(2, 1)
        z = torch.tanh(a) * torch.sigmoid(b)
        h, skip = h + out(z), skip + out(z)
    return net.last(torch.relu(skip).mean(2))


def temporal(net: Any, x: Tensor) -> Tensor:
    h = x.transpose(1, 2)
    for conv in net.convs:
        h = torch.relu(conv(h)[..., : x.shape[1]])
    return net.last(h[..., -1])


def text_cnn(net: Any, ids: Tensor) -> Tensor:
    h = net.embed(ids).transpose(1, 2)
    return net.last(torch.cat([F.relu(c(h)).amax(2) for c in net.convs], 1))


def selective_scan(net: Any, h: Tensor) -> Tensor:
    """A diagonal state-space layer, its recurrence written over time."""
    a, step = -net.rate.exp(), F.softplus(net.step(h))
    state, outs = torch.zeros_like(h[:, 0]), []
    for t in range(h.shape[1]):
        state = state * torch.exp(step[:, t] * a) + step[:, t] * net.inside(h[:, t])
        outs.append(state)
    return torch.stack(outs, 1) + net.skip * h


# Vision and tables


def unet(net: Any, x: Tensor) -> Tensor:
    a = F.relu(net.down1(x))
    b = F.relu(net.down2(F.max_pool2d(a, 2)))
    c = torch.cat([net.up(b), a], 1)
    return net.out(c)


def pixels(model: Any, batch: Any) -> Tensor:
    """The mean over each image's pixels of a cross-entropy."""
    losses = F.cross_entropy(model(batch["x"]), (batch["x"][:, 0] > 0).long(), reduction="none")
    return losses.mean((1, 2))


def dlrm(net: Any, dense: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = [
        net.bottom(dense),
        net.bag(ids),
        net.mean_bag(ids),
        net.weighted(ids, per_sample_weights=weights),
        net.table(ids[:, 0]),
    ]
    stacked = torch.stack(rows, 1)
    pairs = stacked @ stacked.transpose(1, 2)
    i, j = torch.tril_indices(5, 5, -1)
    return net.top(torch.cat([rows[0], pairs[:, i, j]], 1)).squeeze(1)


def clicks(model: Any, batch: Any) -> Tensor:
    scores = model(batch["x"], batch["ids"], batch["weights"])
    return F.binary_cross_entropy_with_logits(scores, (batch["y"] > 0).to(scores), reduction="none")


def reconstruct(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["x"], reduction="none").flatten(1).mean(1)


def siamese(model: Any, batch: Any) -> Tensor:
    a, b = model(batch["x"]), model(batch["x"].flip(1))
    return F.cosine_embedding_loss(a, b, batch["y"].sign() * 2 - 1, margin=-1.0, reduction="none")


def triplet(model: Any, batch: Any) -> Tensor:
    x = batch["x"]
    return F.triplet_margin_loss(model(x), model(x.flip(1)), model(x.roll(1, 1)), margin=5.0, reduction="none")


def speech(model: Any, batch: Any) -> Tensor:
    """CTC of each sequence, of its own length, against its own target."""
    scores = model(batch["x"]).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(
        scores, batch["targets"], batch["lengths"], batch["target_lengths"], reduction="none", zero_infinity=True
    )


# Written by hand


class SharedBias(nn.Module):
    """One bias, several uses: it belongs to two layers, and is added once more, scaled and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        half = torch.cat([self.first.bias[4:] * 0.5, self.first.bias[:4]])
        return self.last(h + half)


class Tied(nn.Module):
    """A language model whose output is its input table; the output has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(torch.tanh(self.hidden(self.embed(ids))))


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


class Cube(torch.autograd.Function):
    """x^3 with a backward of its own, the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


def scaled_without_gradient(_: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        size = h.norm(dim=1, keepdim=True)
    return h / (size + 1) + h.detach().tanh() * h


def write_slices(_: Any, h: Tensor) -> Tensor:
    h = h * 1
    h[:, 0] = h[:, 1] * 2
    h[:, 2:4] += h[:, 4:6]
    h[:, ::2] *= 0.5
    return h


def write_everywhere(net: Any, h: Tensor) -> Tensor:
    buffer = torch.zeros(h.shape[0], 3, WIDTH, dtype=h.dtype)
    buffer[:, 1].copy_(h)
    buffer[:, 2].add_(h.relu_())
    buffer.masked_fill_(buffer > 1.0, 0.5)
    buffer[:, :, 0].zero_()
    return buffer.sum(1).clamp_(min=-2.0).mul_(net.gain)


def write_indexed(_: Any, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    index = torch.tensor([3, 1, 0])
    out.index_put_((torch.arange(h.shape[0]).unsqueeze(1), index.unsqueeze(0)), h[:, :3])
    out.index_add_(1, index, h[:, 3:6])
    out.index_copy_(1, torch.tensor([7]), h[:, 7:])
    out.scatter_add_(1, (h[:, :4] > 0).long() + 4, h[:, :4])
    out[:, index] = out[:, index] * 2
    return out


def write_diagonal(_: Any, h: Tensor) -> Tensor:
    square = (h.unsqueeze(1) * h.unsqueeze(2)).contiguous()
    square.diagonal(dim1=1, dim2=2).copy_(h)
    square.transpose(1, 2)[:, 0].mul_(0.5)
    square.view(h.shape[0], -1)[:, ::9].add_(1.0)
    return square.sum(2)


def write_in_a_loop(_: Any, h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    for i in range(h.shape[1]):
        out[:, i] = h[:, i] if i == 0 else out[:, i - 1].clone() * 0.5 + h[:, i]
    return out


def strided_views(_: Any, h: Tensor) -> Tensor:
    a = h.view(-1, 2, 4).transpose(1, 2)
    b = a.as_strided((h.shape[0], 4), (8, 2))
    return torch.cat([a.permute(0, 2, 1).view(-1, 8)[:, :4], b], 1) + a.reshape(-1, 8)


def sorted_and_gathered(_: Any, h: Tensor) -> Tensor:
    values, order = h.sort(1)
    top, where = h.topk(3, 1)
    picked = h.gather(1, order.flip(1))
    return values + picked.scatter(1, where, top * 0.1) + h.argsort(1).to(h) * h + h.kthvalue(2, 1).values.unsqueeze(1)


def running(_: Any, h: Tensor) -> Tensor:
    return h.cumsum(1) + h.logcumsumexp(1) + h.cummax(1).values + (h * 0.1 + 1).cumprod(1) + h.cummin(1).values


def patches(_: Any, h: Tensor) -> Tensor:
    columns = F.unfold(h, 3, padding=1, stride=2)
    return F.fold(columns * columns.sigmoid(), (8, 8), 3, padding=1, stride=2)


def windows(_: Any, h: Tensor) -> Tensor:
    return h.unfold(1, 3, 2).sum(-1).pow(2).repeat(1, 3)[:, :8]


def warp(net: Any, h: Tensor) -> Tensor:
    theta = net.locate(h.flatten(2).mean(2)).view(-1, 2, 3) + torch.eye(2, 3, dtype=h.dtype)
    grid = F.affine_grid(theta, [h.shape[0], 4, 6, 6], align_corners=False)
    return F.grid_sample(h, grid, align_corners=False, padding_mode="border")


def resized(_: Any, h: Tensor) -> Tensor:
    sizes = [F.interpolate(h, size=(5, 7), mode=m, align_corners=False) for m in ("bilinear", "bicubic")]
    near = [F.interpolate(h, size=(5, 7), mode=m) for m in ("nearest", "nearest-exact", "area")]
    row = F.interpolate(h.flatten(2), size=35, mode="linear", align_corners=True).view(-1, 4, 5, 7)
    cube = F.interpolate(h.unsqueeze(2), size=(1, 5, 7), mode="trilinear", align_corners=True).squeeze(2)
    return sum([*sizes, *near, row, cube], torch.zeros(()).to(h))


def fourier(net: Any, h: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(h, norm="ortho") * torch.view_as_complex(net.filter)
    back: Tensor = torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho")
    return back + torch.fft.fft(h, dim=-1).abs()


def complex_rotation(_: Any, h: Tensor) -> Tensor:
    z = torch.view_as_complex(h.view(-1, 4, 2))
    turned = z * torch.polar(torch.ones(4), torch.arange(4.0)).to(z)
    return torch.cat([torch.view_as_real(turned).flatten(1)[:, :4], z.abs() + z.angle() + (z * z.conj()).real], 1)


def bordered(_: Any, h: Tensor) -> Tensor:
    modes = [F.pad(h, (1, 2, 2, 1), mode=m) for m in ("reflect", "replicate", "circular", "constant")]
    row = F.pad(h.flatten(2), (2, 3), mode="reflect").mean((1, 2))
    cube = F.pad(h.unsqueeze(2), (1, 1, 1, 1, 0, 0), mode="replicate").mean((1, 2, 3, 4))
    return (
        torch.stack(modes).sum(0)[..., 1:]
        + (row + cube).view(-1, 1, 1, 1)
        + F.pad(h, (-2, 2, 1, 0)).mean((1, 2, 3), keepdim=True)
    )


def pooled(_: Any, h: Tensor) -> Tensor:
    parts = [
        F.max_pool2d(h, 3, 2, 1),
        F.avg_pool2d(h, 3, 2, 1, count_include_pad=False),
        F.lp_pool2d(h.abs() + 0.1, 2, 2),
        F.adaptive_avg_pool2d(h, (4, 4)),
        F.adaptive_max_pool2d(h, (4, 4)),
        F.adaptive_max_pool2d(h, (3, 5))[..., :3, :3].repeat(1, 1, 2, 2)[..., :4, :4],
        F.max_pool3d(h.unsqueeze(2), (1, 2, 2)).squeeze(2),
        F.avg_pool3d(h.unsqueeze(2), (1, 2, 2)).squeeze(2),
        F.adaptive_avg_pool3d(h.unsqueeze(2), (1, 4, 4)).squeeze(2),
        F.adaptive_max_pool3d(h.unsqueeze(2), (1, 4, 4)).squeeze(2),
        F.max_pool1d(h.flatten(2), 4).view(-1, 4, 4, 4),
        F.avg_pool1d(h.flatten(2), 4).view(-1, 4, 4, 4),
        F.adaptive_max_pool1d(h.flatten(2), 16).view(-1, 4, 4, 4),
        F.adaptive_avg_pool1d(h.flatten(2), 16).view(-1, 4, 4, 4),
    ]
    return torch.stack(parts).sum(0)


def unpooled(_: Any, h: Tensor) -> Tensor:
    small, where = F.max_pool2d(h, 2, return_indices=True)
    flat, at = F.max_pool1d(h.flatten(2), 2, return_indices=True)
    return F.max_unpool2d(small * 2, where, 2) + F.max_unpool1d(flat, at, 2).view(-1, 4, 8, 8)


def distances(net: Any, h: Tensor) -> Tensor:
    a, b = h.view(-1, 2, 4).unbind(1)
    near = torch.cdist(h.view(-1, 2, 4), net.centres.expand(h.shape[0], 4, 4)).flatten(1)
    return near + torch.stack([F.cosine_similarity(a, b), F.pairwise_distance(a, b)], 1).repeat(1, 4)


def binned(net: Any, h: Tensor) -> Tensor:
    bins = torch.bucketize(h.detach(), net.edges)
    kinds = F.one_hot(bins, 4).to(h)
    found = torch.searchsorted(net.edges, h.detach(), right=True)
    return h * kinds.sum((1, 2)).unsqueeze(1) + net.values[found].squeeze(-1) + kinds.argmax(-1) * h


def solved(_: Any, h: Tensor) -> Tensor:
    a = h[:, :4].view(-1, 2, 2)
    spd = a @ a.transpose(1, 2) + 2 * torch.eye(2, dtype=h.dtype)
    x = torch.linalg.solve(spd, h[:, 4:].view(-1, 2, 2))
    lower = torch.linalg.cholesky(spd)
    more = torch.linalg.inv(spd) + torch.matrix_exp(a * 0.1)
    scalars = torch.linalg.slogdet(spd).logabsdet
    return torch.cat([x.flatten(1), (lower + more).flatten(1)], 1) + scalars.unsqueeze(1)


def activations(_: Any, h: Tensor) -> Tensor:
    kinds = (F.gelu, F.silu, F.elu, F.selu, F.celu, F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.hardtanh, F.logsigmoid, F.softsign, F.tanhshrink, F.softshrink, F.hardshrink, F.leaky_relu, F.relu6, F.rrelu)  # fmt: skip
    total = torch.stack([k(h) for k in kinds]).sum(0) + F.threshold(h, 0.1, 0.2) + F.gelu(h, approximate="tanh")
    return total + F.glu(torch.cat([h, h], 1)) + F.softmin(h, 1) + F.log_softmax(h, 1) + h.erf() + torch.special.i0(h)


def statistics(_: Any, h: Tensor) -> Tensor:
    parts = [h.std(1), h.var(1), h.norm(dim=1), h.logsumexp(1), h.amax(1), h.amin(1), h.median(1).values, h.prod(1)]
    more = [
        h.max(1).values,
        h.min(1).values,
        h.mode(1).values,
        h.quantile(0.3, 1),
        h.norm(p=3, dim=1),
        h.aminmax(dim=1).max,
        h.nansum(1),
        h.count_nonzero(1).to(h),
    ]
    return torch.stack(parts, 1) + torch.stack(more, 1)


def rearranged(_: Any, h: Tensor) -> Tensor:
    a = h.roll(1, 1) + h.flip(1) + h.repeat_interleave(2, 1)[:, ::2] + h.view(-1, 2, 4).rot90(1, (1, 2)).flatten(1)
    b = (
        torch.stack(h.chunk(4, 1), 2).flatten(1)
        + torch.tensor_split(h, 2, 1)[0].repeat(1, 2)
        + h.diff(dim=1, prepend=h[:, :1])
    )
    c = (
        h.unsqueeze(1).tril(0).triu(-1).sum(1)
        + torch.trapezoid(h, dim=1).unsqueeze(1)
        + h.take_along_dim(h.argmax(1, keepdim=True), 1)
    )
    return (
        a
        + b
        + c
        + F.channel_shuffle(h.view(-1, 8, 1), 2).flatten(1)
        + h.movedim(1, 0).movedim(0, 1)
        + h.narrow(1, 0, 1)
    )


def multiplied(net: Any, h: Tensor) -> Tensor:
    a = torch.einsum("bi,ijk,bj->bk", h, net.core, h)
    b = torch.tensordot(h, net.core.sum(0), dims=([1], [0])) + F.bilinear(h, h, net.core, net.bias)
    c = torch.baddbmm(h.unsqueeze(1), h.unsqueeze(1), net.core.sum(1).expand(h.shape[0], 8, 8)).squeeze(1)
    d = (
        torch.addcmul(h, h, h, value=0.5)
        + torch.lerp(h, a, 0.3)
        + torch.outer(net.bias, net.bias).sum(0)
        + torch.hypot(h, a)
    )
    return a + b + c + d


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="none"),
    "smooth_labels": lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1),
    "ignored": lambda z, y: F.cross_entropy(z, y.masked_fill(y == 2, -100), reduction="none"),
    "soft_targets": lambda z, y: F.cross_entropy(z, F.one_hot(y, 3).to(z), reduction="none"),
    "huber": lambda z, y: F.huber_loss(z, F.one_hot(y, 3).to(z), reduction="none").mean(1),
    "smooth_l1": lambda z, y: F.smooth_l1_loss(z, F.one_hot(y, 3).to(z), reduction="none").mean(1),
    "l1": lambda z, y: F.l1_loss(z, F.one_hot(y, 3).to(z), reduction="none").mean(1),
    "kl": lambda z, y: F.kl_div(z.log_softmax(1), F.one_hot(y, 3).to(z), reduction="none").sum(1),
    "gaussian": lambda z, y: F.gaussian_nll_loss(z[:, 0], y.to(z), z[:, 1].exp(), reduction="none"),
    "poisson": lambda z, y: F.poisson_nll_loss(z[:, 0], y.to(z), reduction="none", full=True),
    "multi_margin": lambda z, y: F.multi_margin_loss(z, y, reduction="none"),
    "multilabel_margin": lambda z, y: F.multilabel_margin_loss(z, F.pad(y.unsqueeze(1), (0, 2), value=-1), reduction="none"),
    "multilabel_soft_margin": lambda z, y: F.multilabel_soft_margin_loss(z, F.one_hot(y, 3).to(z), reduction="none"),
    "soft_margin": lambda z, y: F.soft_margin_loss(z, F.one_hot(y, 3).to(z) * 2 - 1, reduction="none").mean(1),
    "hinge": lambda z, y: F.hinge_embedding_loss(z[:, 0], y.sign() * 2 - 1, reduction="none"),
    "ranking": lambda z, y: F.margin_ranking_loss(z[:, 0], z[:, 1], y.sign() * 2 - 1, reduction="none"),
    "binary": lambda z, y: F.binary_cross_entropy(z.sigmoid(), F.one_hot(y, 3).to(z), reduction="none").mean(1),
}  # fmt: skip


def all_losses(model: Any, batch: Any) -> Tensor:
    z = model(batch["x"])
    return torch.stack([loss(z, batch["y"]) for loss in LOSSES.values()]).sum(0)


def checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def middle(net: Any, h: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda z: torch.tanh(net.block(z)), h, use_reentrant=reentrant)
        return out + h

    return middle


def data() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    lengths = torch.tensor([5, 3, 4, 5, 2, 5])
    series = torch.randn(POOL, 5, 6, generator=g)
    ids = torch.randint(0, 20, (POOL, 6), generator=g)
    return {
        "points": {"x": torch.randn(POOL, 6, generator=g), "y": y},
        "series": {"x": series, "y": y},
        "padded": {"x": series, "padding": torch.arange(5) >= lengths[:, None], "y": y},
        "lengths": {"x": series, "padding": lengths, "y": y},
        "images": {"x": torch.randn(POOL, 3, 8, 8, generator=g), "y": y},
        "volumes": {"x": torch.randn(POOL, 2, 4, 6, 6, generator=g), "y": y},
        "ids": {"x": ids, "y": y},
        "clicks": {"x": torch.randn(POOL, 4, generator=g), "ids": ids, "weights": torch.rand(POOL, 6, generator=g), "y": y},
        "speech": {
            "x": torch.randn(POOL, 9, 6, generator=g),
            "targets": torch.tensor([[1, 2, 3], [2, 2, 0], [1, 0, 0], [3, 2, 1], [1, 1, 2], [3, 0, 0]]),
            "lengths": torch.tensor([9, 7, 4, 8, 9, 6]),
            "target_lengths": torch.tensor([3, 2, 1, 3, 3, 1]),
        },
        "flags": {"x": torch.rand(POOL, 6, generator=g) > 0.4, "n": torch.randint(0, 5, (POOL, 2), generator=g), "y": y},
    }  # fmt: skip


def table() -> list[tuple[Any, ...]]:
    """(name, family, what to build, loss, which data)"""
    head, lin = functools.partial(nn.Linear, WIDTH, 3), nn.Linear
    block = functools.partial(nn.Linear, WIDTH, WIDTH)
    par = lambda *shape: nn.Parameter(torch.randn(*shape) * 0.3)  # noqa: E731

    def recurrent(kind: Any, **options: Any) -> Callable[[], Net]:
        def make() -> Net:
            rnn = kind(6, 8, batch_first=True, **options)
            wide = (options.get("proj_size", 0) or 8) * (2 if options.get("bidirectional") else 1)
            return Net(lambda n, x: n.last(n.rnn(x)[0].mean(1)), rnn=rnn, last=lin(wide, 3))

        return make

    def layer(kind: Any, **options: Any) -> nn.Module:
        made: nn.Module = kind(WIDTH, 2, 16, batch_first=True, dropout=0.0, **options)
        return made

    return [
        ("gru", "sequence", recurrent(nn.GRU, num_layers=2), classify, "series"),
        ("rnn", "sequence", recurrent(nn.RNN, bidirectional=True), classify, "series"),
        ("rnn_relu", "sequence", recurrent(nn.RNN, nonlinearity="relu"), classify, "series"),
        ("lstm_projected", "sequence", recurrent(nn.LSTM, proj_size=4), classify, "series"),
        ("lstm_of_lengths", "sequence", lambda: Net(last_of_length, rnn=nn.LSTM(6, 8, batch_first=True, bidirectional=True), last=lin(16, 3)), padded, "lengths"),
        ("lstm_cell", "sequence", lambda: Net(lambda n, x: n.last(functools.reduce(lambda s, t: n.cell(x[:, t], s), range(5), None)[0]), cell=nn.LSTMCell(6, 8), last=head()), classify, "series"),
        ("gru_cell", "sequence", lambda: Net(lambda n, x: n.last(functools.reduce(lambda s, t: n.cell(x[:, t], s), range(5), None)), cell=nn.GRUCell(6, 8), last=head()), classify, "series"),
        ("multihead_attention", "sequence", lambda: Net(attend, first=lin(6, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True), last=head()), padded, "padded"),
        ("attention_bias_k_v", "sequence", lambda: Net(attend_fused, first=lin(6, 8), attention=nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True), last=head()), padded, "padded"),
        ("attention_other_sizes", "sequence", lambda: Net(lambda n, x: n.last(n.attention(n.first(x), x, x)[0].mean(1)), first=lin(6, 8), attention=nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True), last=head()), classify, "series"),
        ("transformer_encoder", "sequence", lambda: Net(lambda n, x, p: n.last(n.encoder(n.first(x), src_key_padding_mask=p).mean(1)), first=lin(6, 8), encoder=nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2), last=head()), padded, "padded"),
        ("encoder_norm_first", "sequence", lambda: tokens(lambda n, h: n.encoder(h, mask=torch.ones(5, 5).tril() == 0, is_causal=False), encoder=nn.TransformerEncoder(layer(nn.TransformerEncoderLayer, norm_first=True, activation="gelu"), 1, norm=nn.LayerNorm(8))), classify, "series"),
        ("transformer_decoder", "sequence", lambda: Net(decode, first=lin(6, 8), decoder=nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2), last=head()), padded, "padded"),
        ("transformer", "sequence", lambda: Net(translate, first=lin(6, 8), transformer=nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), last=head()), padded, "padded"),
        ("mlp_mixer", "vision", lambda: tokens(mix, norm1=nn.LayerNorm(8), norm2=nn.LayerNorm(8), across=nn.Sequential(lin(5, 7), nn.GELU(), lin(7, 5)), along=nn.Sequential(block(), nn.GELU(), block())), classify, "series"),
        ("wavenet", "audio", lambda: Net(wavenet, first=nn.Conv1d(6, 8, 1), filters=nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(3)), outs=nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3)), last=head()), classify, "series"),
        ("temporal_cnn", "sequence", lambda: Net(temporal, convs=nn.ModuleList(nn.utils.parametrizations.weight_norm(nn.Conv1d(6 if i == 0 else 8, 8, 3, padding=2 * 2**i, dilation=2**i)) for i in range(2)), last=head()), classify, "series"),
        ("text_cnn", "text", lambda: Net(text_cnn, embed=nn.Embedding(20, 8, padding_idx=0), convs=nn.ModuleList(nn.Conv1d(8, 4, k) for k in (2, 3)), last=lin(8, 3)), classify, "ids"),
        ("state_space", "sequence", lambda: tokens(selective_scan, rate=par(8), step=block(), inside=block(), skip=par(8)), classify, "series"),
        ("conv1d", "audio", lambda: Net(lambda n, x: n.net(x), net=nn.Sequential(nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.PReLU(8), nn.Conv1d(8, 8, 2, groups=4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), head())), classify, "series"),
        ("conv3d", "vision", lambda: Net(lambda n, x: n.net(x), net=nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.MaxPool3d(2), nn.ConvTranspose3d(4, 4, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), lin(4, 3))), classify, "volumes"),
        ("unet", "vision", lambda: Net(unet, down1=nn.Conv2d(3, 4, 3, padding=1), down2=nn.Conv2d(4, 8, 3, padding=1), up=nn.ConvTranspose2d(8, 4, 2, 2), out=nn.Conv2d(8, 2, 1)), pixels, "images"),
        ("transposed_conv", "vision", lambda: images(lambda n, h: n.b(n.a(h)), a=nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=2), b=nn.Conv2d(4, 4, 3, dilation=2, padding="same", padding_mode="circular")), classify, "images"),
        ("group_norm", "vision", lambda: images(lambda n, h: n.norm(h), norm=nn.GroupNorm(2, 4)), classify, "images"),
        ("instance_norm", "vision", lambda: images(lambda n, h: torch.relu(n.norm(h)), norm=nn.InstanceNorm2d(4, affine=True)), classify, "images"),
        ("instance_norm_tracked", "vision", lambda: images(lambda n, h: n.norm(h), norm=nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), classify, "images"),
        ("local_response_norm", "vision", lambda: images(lambda n, h: n.norm(h), norm=nn.LocalResponseNorm(3)), classify, "images"),
        ("rms_norm", "sequence", lambda: tokens(lambda n, h: n.norm(h), norm=nn.RMSNorm(8)), classify, "series"),
        ("layer_norm_over_images", "vision", lambda: images(lambda n, h: n.norm(h) * h, norm=nn.LayerNorm([4, 8, 8])), classify, "images"),
        ("bilinear", "table", lambda: sandwich(lambda n, h: n.pair(h, h.tanh()), pair=nn.Bilinear(8, 8, 8)), classify, "points"),
        ("prelu", "vision", lambda: images(lambda n, h: n.one(n.many(h)), one=nn.PReLU(), many=nn.PReLU(4)), classify, "images"),
        ("pixel_shuffle", "vision", lambda: images(lambda n, h: F.pixel_unshuffle(n.up(n.wide(h)), 4), 16, wide=nn.Conv2d(4, 4, 1), up=nn.PixelShuffle(2)), classify, "images"),
        ("squeeze_excitation", "vision", lambda: images(lambda n, h: n.deep(h) * n.gate(h.mean((2, 3))).sigmoid()[:, :, None, None], deep=nn.Conv2d(4, 4, 3, padding=1, groups=4), gate=lin(4, 4)), classify, "images"),
        ("dlrm", "table", lambda: Net(dlrm, bottom=lin(4, 8), bag=nn.EmbeddingBag(20, 8, mode="sum"), mean_bag=nn.EmbeddingBag(20, 8, mode="mean", padding_idx=0), weighted=nn.EmbeddingBag(20, 8, mode="sum"), table=nn.Embedding(20, 8), top=lin(18, 1)), clicks, "clicks"),
        ("bag_of_maxima", "table", lambda: Net(lambda n, i: n.last(torch.tanh(n.bag(i) + n.shift_bias)), bag=nn.EmbeddingBag(20, 8, mode="max"), shift_bias=par(8), last=head()), classify, "ids"),
        ("autoencoder", "table", lambda: Net(lambda n, x: n.net(x), net=nn.Sequential(lin(6, 3), nn.Tanh(), lin(3, 6))), reconstruct, "points"),
        ("siamese", "table", lambda: Net(lambda n, x: n.net(x), net=nn.Sequential(lin(6, 8), nn.Tanh(), lin(8, 4))), siamese, "points"),
        ("triplet", "table", lambda: Net(lambda n, x: n.net(x), net=nn.Sequential(lin(6, 8), nn.Tanh(), lin(8, 4))), triplet, "points"),
        ("ctc", "audio", lambda: Net(lambda n, x: n.net(x), net=nn.Sequential(lin(6, 8), nn.Tanh(), lin(8, 4))), speech, "speech"),
        ("every_loss", "table", lambda: sandwich(lambda n, h: h.tanh()), all_losses, "points"),
        ("shared_bias", "by hand", SharedBias, classify, "points"),
        ("scaled_bias", "by hand", lambda: sandwich(lambda n, h: h.tanh() + n.shift_bias.pow(2) * 0.5 + n.shift_bias[:1], shift_bias=par(8)), classify, "points"),
        ("bias_over_tokens", "by hand", lambda: tokens(lambda n, h: torch.tanh(h + n.free) * n.scale, free=par(1, 1, 8), scale=par(8)), classify, "series"),
        ("bias_inside_where", "by hand", lambda: sandwich(lambda n, h: torch.where(h > 0, h + n.hot_bias, h.tanh() * n.hot_bias.exp()), hot_bias=par(8)), classify, "points"),
        ("einsum", "by hand", lambda: tokens(lambda n, h: torch.einsum("btc,cdk,bsd->btk", h, n.core, h) + n.out_bias, core=par(8, 8, 8), out_bias=par(8)), classify, "series"),
        ("weight_norm", "by hand", lambda: sandwich(lambda n, h: n.block(h), block=nn.utils.parametrizations.weight_norm(block())), classify, "points"),
        ("old_weight_norm", "by hand", lambda: images(lambda n, h: n.conv(h), conv=nn.utils.weight_norm(nn.Conv2d(4, 4, 3))), classify, "images"),
        ("spectral_norm", "by hand", lambda: sandwich(lambda n, h: n.block(h), block=nn.utils.parametrizations.spectral_norm(block())), classify, "points"),
        ("linear_on_4d", "by hand", lambda: Net(lambda n, x: n.last(n.first(x.permute(0, 2, 3, 1)).tanh()).mean((1, 2)), first=lin(3, 8), last=head()), classify, "images"),
        ("batch_second", "by hand", lambda: Net(lambda n, x: n.last(n.first(x.transpose(0, 1)).cumsum(0).tanh().mean(0)), first=lin(6, 8), last=head()), classify, "series"),
        ("dict_output", "by hand", lambda: Net(lambda n, x: {"logits": n.last(n.first(x).tanh()), "none": None}, first=lin(6, 8), last=head()), lambda m, b: cross_entropy(m(b["x"])["logits"], b["y"]), "points"),
        ("dataclass_output", "by hand", lambda: Net(lambda n, x: Answer(n.last(n.first(x).tanh()), x), first=lin(6, 8), last=head()), lambda m, b: cross_entropy(m(b["x"]).logits, b["y"]), "points"),
        ("keyword_inputs", "by hand", lambda: Net(lambda n, *, x, scale=1.0, flip=False: n.last(n.first(x.flip(1) if flip else x).tanh() * scale), first=lin(6, 8), last=head()), lambda m, b: cross_entropy(m(x=b["x"], scale=2.0, flip=True), b["y"]), "points"),
        ("integers_and_booleans", "by hand", lambda: Net(lambda n, f, i: n.last(n.first(f.to(n.first.weight)) + n.table[i].sum(1) + (i > 2).any(1, keepdim=True)), first=lin(6, 8), table=torch.randn(5, 8), last=head()), lambda m, b: cross_entropy(m(b["x"], b["n"]), b["y"]), "flags"),
        ("not_contiguous", "by hand", lambda: tokens(lambda n, h: n.deep(h.transpose(1, 2).contiguous().transpose(1, 2)[:, ::2].tanh()), deep=block()), lambda m, b: cross_entropy(m(b["x"].transpose(1, 2).contiguous().transpose(1, 2)), b["y"]), "series"),
        ("tied_embeddings", "by hand", Tied, lambda m, b: F.cross_entropy(m(b["x"][:, :-1]).transpose(1, 2), b["x"][:, 1:], reduction="none").mean(1), "ids"),
        ("writes_slices", "in place", lambda: sandwich(write_slices), classify, "points"),
        ("writes_everywhere", "in place", lambda: sandwich(write_everywhere, gain=par(8)), classify, "points"),
        ("writes_indexed", "in place", lambda: sandwich(write_indexed), classify, "points"),
        ("writes_diagonal", "in place", lambda: sandwich(write_diagonal), classify, "points"),
        ("writes_in_a_loop", "in place", lambda: sandwich(write_in_a_loop), classify, "points"),
        ("strided_views", "in place", lambda: sandwich(strided_views), classify, "points"),
        ("checkpoint", "by hand", lambda: sandwich(checkpointed(False), block=block()), classify, "points"),
        ("no_grad_inside", "by hand", lambda: sandwich(scaled_without_gradient), classify, "points"),
        ("low_rank_adapter", "by hand", lambda: tokens(lambda n, h: n.frozen(h) + F.linear(F.linear(h, n.down), n.up, n.up_bias) * 2, frozen=block(), down=par(2, 8), up=par(8, 2), up_bias=par(8)), classify, "series"),
        ("own_function", "by hand", lambda: sandwich(lambda n, h: Cube.apply(h)), classify, "points"),
        ("sort_topk_gather", "operators", lambda: sandwich(sorted_and_gathered), classify, "points"),
        ("running", "operators", lambda: sandwich(running), classify, "points"),
        ("unfold_fold", "operators", lambda: images(patches), classify, "images"),
        ("windows", "operators", lambda: sandwich(windows), classify, "points"),
        ("spatial_transformer", "operators", lambda: images(warp, locate=lin(4, 6)), classify, "images"),
        ("resized", "operators", lambda: images(resized), classify, "images"),
        ("fourier", "operators", lambda: images(fourier, filter=torch.randn(4, 8, 5, 2)), classify, "images"),
        ("complex", "operators", lambda: sandwich(complex_rotation), classify, "points"),
        ("bordered", "operators", lambda: images(bordered), classify, "images"),
        ("pooled", "operators", lambda: images(pooled), classify, "images"),
        ("unpooled", "operators", lambda: images(unpooled), classify, "images"),
        ("distances", "operators", lambda: sandwich(distances, centres=torch.randn(1, 4, 4)), classify, "points"),
        ("binned", "operators", lambda: sandwich(binned, edges=torch.tensor([-0.5, 0.0, 0.5]), values=torch.randn(4, 1)), classify, "points"),
        ("linear_algebra", "operators", lambda: sandwich(solved), classify, "points"),
        ("activations", "operators", lambda: sandwich(activations), classify, "points"),
        ("statistics", "operators", lambda: sandwich(statistics), classify, "points"),
        ("rearranged", "operators", lambda: sandwich(rearranged), classify, "points"),
        ("multiplied", "operators", lambda: sandwich(multiplied, core=par(8, 8, 8), bias=par(8)), classify, "points"),
    ]  # fmt: skip


@functools.cache
def cases() -> dict[str, Case]:
    pools = data()
    return {name: Case(name, make, loss, pools[kind]) for name, _, make, loss, kind in table()}


def packed(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return net.last(net.rnn(rows)[1][-1])


def last_unguarded(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    at = (lengths - 1).view(-1, 1, 1).expand(-1, 1, 8)
    return net.last(net.rnn(x)[0].gather(1, at).squeeze(1))


class Item(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        scale = h.abs().amax().item()
        return h / scale


class Branch(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        if h.sum() > 0:
            return h
        return -h


class Loop(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        while h.norm() > 1:
            h = h / 2
        return h


class Positive(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * h[h > 0].sum()


class Places(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h + torch.nonzero(h).sum()


class Kinds(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * torch.unique(h.round()).shape[0]


class Counted(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * F.one_hot((h > 0).sum(1)).sum()


@functools.cache
def refused() -> dict[str, tuple[Case, tuple[str, ...]]]:
    """Models that compile must refuse, with words of the reason, of the user's line and of the remedy."""
    pools = data()
    encoder = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16, 0.0, batch_first=True)
    found: list[tuple[str, Callable[[], nn.Module], Any, str, tuple[str, ...]]] = [
        ("packed_sequence", lambda: Net(packed, rnn=nn.GRU(6, 8, batch_first=True), last=nn.Linear(8, 3)), padded, "lengths", ("pack_padded_sequence(x, lengths", "gather(1, lengths - 1)")),
        ("unguarded_lengths", lambda: Net(last_unguarded, rnn=nn.GRU(6, 8, batch_first=True), last=nn.Linear(8, 3)), padded, "lengths", ("one bad record would stop a run",)),
        ("mask_compared", lambda: tokens(lambda n, h: n.encoder(h, mask=torch.ones(5, 5).tril() == 0), encoder=nn.TransformerEncoder(encoder(), 1)), classify, "series", ("zoo_torch.py", "is_causal=True or False")),
        ("checkpoint_reentrant", lambda: sandwich(checkpointed(True), block=nn.Linear(WIDTH, WIDTH)), classify, "points", ("own backward fails", "use_reentrant=False")),
        ("item", lambda: sandwich(lambda n, h: n.part(h), part=Item()), classify, "points", ("h.abs().amax().item()", "Keep the value a tensor")),
        ("branch", lambda: sandwich(lambda n, h: n.part(h), part=Branch()), classify, "points", ("if h.sum() > 0", "torch.where(condition, a, b)")),
        ("loop", lambda: sandwich(lambda n, h: n.part(h), part=Loop()), classify, "points", ("while h.norm() > 1", "torch.where(condition, a, b)")),
        ("boolean_index", lambda: sandwich(lambda n, h: n.part(h), part=Positive()), classify, "points", ("h[h > 0].sum()", "weigh it by the mask")),
        ("nonzero", lambda: sandwich(lambda n, h: n.part(h), part=Places()), classify, "points", ("torch.nonzero(h)", "weigh it by the mask")),
        ("unique", lambda: sandwich(lambda n, h: n.part(h), part=Kinds()), classify, "points", ("torch.unique(h.round())",)),
        ("classes_counted", lambda: sandwich(lambda n, h: n.part(h), part=Counted()), classify, "points", ("one_hot",)),
    ]  # fmt: skip
    return {name: (Case(name, make, loss, pools[kind]), words) for name, make, loss, kind, words in found}
