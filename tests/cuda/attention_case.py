"""One problem of attention for the CUDA kernels in the emulator, and the exact answer."""

from dataclasses import dataclass
from functools import cached_property
from unittest import mock

import emulator
import torch

from tinyllm.ops import cuda_attention, cuda_hopper, library, reference

BORDER = 3  # rows of NaN behind each sequence: what reads past the end shows

NAMES = ("o", "d_q", "d_k", "d_v")


@dataclass
class Case:
    b: int
    h: int
    g: int
    t: int
    k: int
    e: int
    documents: bool = False
    window: int = 0
    dtype: torch.dtype = torch.bfloat16
    size: float = 1.0
    hopper: bool = False

    @cached_property
    def tensors(self):
        """q, k, v and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for heads, width in (
            (self.h, self.k),
            (self.g, self.k),
            (self.g, self.e),
            (self.h, self.e),
        ):
            x = torch.full((self.b, self.t + BORDER, heads, width), torch.nan)
            x[:, : self.t].normal_(generator=generator).mul_(self.size)
            tensors.append(x.to(self.dtype)[:, : self.t].transpose(1, 2))
        return tensors

    @cached_property
    def document_ids(self):
        if not self.documents:
            return None
        ends = torch.rand(self.b, self.t, generator=torch.Generator().manual_seed(1)) < 1 / 40
        return ends.cumsum(1) * 3

    @property
    def scale(self):
        return self.k**-0.5

    def results_of(self, function, dtype=None):
        """Output and three gradients of a function with `reference.attention`'s arguments."""
        q, k, v, d_o = (x.to(dtype or self.dtype) for x in self.tensors)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        o = function(*inputs, self.document_ids, self.window, self.scale)
        return [x.detach() for x in (o, *torch.autograd.grad(o, inputs, d_o))]

    @cached_property
    def exact(self):
        return self.results_of(reference.attention, torch.float64)

    @cached_property
    def allowed(self):
        """Per result the largest and the root mean square error: 2x torch's own, 3x for gradients.

        FlashAttention's rule. One unit in the last place is granted besides.
        """
        others = [self.results_of(f) for f in (reference.attention, library.attention)]
        return [
            [
                (3 if i else 2) * max(pair) + torch.finfo(self.dtype).eps
                for pair in zip(*(wrong(other[i], self.exact[i]) for other in others), strict=True)
            ]
            for i in range(4)
        ]

    @cached_property
    def exact_lse(self):
        q, k = (x.double() for x in self.tensors[:2])
        scores = self.scale * q @ k.repeat_interleave(self.h // self.g, dim=1).mT
        mask = reference.visible(self.t, self.document_ids, self.window, q.device)
        return scores.masked_fill(~mask, -torch.inf).logsumexp(-1)

    def run(self, seed, edits=()):
        """Yield output and log-sum-exp, then the gradients, as the emulator computes them.

        Bank conflicts and writes behind a result are failures of the run.
        """
        results = []

        def run(launch):
            if self.hopper and launch.entry == cuda_hopper.REPLACES:
                launch = cuda_hopper.of(launch)
            mine = tuple(e for e in edits if e[0].endswith(".h") or e[0] == launch.source)
            if conflicts := emulator.run(launch, seed, mine):
                raise emulator.EmulatorError(f"{launch.source}: {conflicts} bank conflicts")
            if not all(x[:, self.t :].isnan().all() for x in results):
                raise emulator.EmulatorError(f"{launch.source} writes behind a sequence")

        def with_border(like, width):
            b, heads, t, _ = like.shape
            results.append(like.new_full((b, t + BORDER, heads, width), torch.nan))
            return results[-1][:, :t].transpose(1, 2)

        q, k, v, d_o = self.tensors
        rest = (self.document_ids, self.window, self.scale)
        with mock.patch.object(cuda_attention, "empty_heads", with_border):
            o, lse = cuda_attention.forward(run, q, k, v, *rest)
            yield o, lse
            yield cuda_attention.backward(run, d_o, q, k, v, o, lse, *rest)

    def failures(self, results, names=NAMES):
        """Return which results are not within what is allowed."""
        failures = []
        for name, result in zip(names, results, strict=True):
            i = NAMES.index(name)
            errors = wrong(result, self.exact[i])
            if not all(a <= b for a, b in zip(errors, self.allowed[i], strict=True)):  # or NaN
                failures.append(name)
        return failures


def wrong(a, exact):
    """Largest and root mean square error, as shares of the exact numbers' root mean square."""
    error = (a.double() - exact).abs()
    size = exact.square().mean().sqrt() + 1e-30
    return float(error.max() / size), float(error.square().mean().sqrt() / size)
