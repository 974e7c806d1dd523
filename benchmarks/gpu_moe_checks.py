"""The experts' kernels on the device, checked before anything is timed.

Against a loop in float64, on memory full of NaN, in every type; routing against its twin in plain PyTorch; bits that repeat;
no wait for the host, and a CUDA graph of forward and backward that computes what a call computes.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token, S = T K rows sorted by expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_common import Row, float32_products, poisoned_memory, relative_error
from gpu_sections import Report, failure, in_parallel
from moe_peers_gpu import Contender, Routed, Shape, Weights, contenders, random_routing
from torch import Tensor

from lightning_mue.kernels.dispatch.op import DispatchPlan, plan_dispatch
from lightning_mue.kernels.grouped_ffn.op import grouped_ffn

BACKENDS = ("triton", "grouped_mm", "torch")
TENSORS = ("y", "dx", "dgates", "dw_gate", "dw_up", "dw_down", "db_gate", "db_up")


class Precision(NamedTuple):
    """A type of products.

    Attributes:
        dtype: Of x and the weights.
        float32: How float32 matrices are multiplied, "ieee" or "tf32".
        error: Largest relative error allowed. Those of docs/gpu.md; tf32 and float16 have 10 bits.
    """

    dtype: torch.dtype
    float32: str
    error: float


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16, "ieee", 1e-2),
    "float32": Precision(torch.float32, "ieee", 1e-5),
    "float16": Precision(torch.float16, "ieee", 2e-3),
    # Tensor cores cut tf32 operands off: about 7e-4 a product, all to one side; 2.3e-3 for the whole pass (emulated).
    "tf32": Precision(torch.float32, "tf32", 4e-3),
}


class Case(NamedTuple):
    """A problem to check: sizes, kind of routing (`random_routing`), activation, whether there are biases, masked tokens."""

    shape: Shape
    kind: str = "balanced"
    activation: str = "swiglu"
    biases: bool = False
    masked: int = 0

    def __str__(self) -> str:
        extras = [self.kind, self.activation, *["biases"] * self.biases, *[f"{self.masked} masked"] * bool(self.masked)]
        return f"{self.shape}, {', '.join(extras)}"


#: In every type; then what is only in bfloat16 and float32, since each new kind of kernel has to be compiled first.
CASES = [
    Case(Shape(1000, 192, 128, 8, 2)),
    Case(Shape(2048, 1024, 512, 16, 4), "everybody"),
    Case(Shape(512, 256, 128, 64, 2), "hot"),
]
MORE_CASES = [
    Case(Shape(1, 192, 128, 8, 2)),
    Case(Shape(0, 192, 128, 8, 2)),
    Case(Shape(200, 192, 128, 1, 1)),
    Case(Shape(256, 192, 128, 4, 4)),
    Case(Shape(1000, 192, 128, 8, 2), masked=100),
    Case(Shape(300, 77, 45, 5, 3)),
    Case(Shape(1000, 192, 128, 8, 2), activation="geglu", biases=True),
    Case(Shape(1000, 192, 128, 8, 2), activation="relu2", biases=True),
]
SMOKE_CASES = [Case(Shape(60, 24, 16, 3, 2), "hot", masked=3)]
SMOKE_MORE = [Case(Shape(90, 27, 22, 2, 1), activation="relu2", biases=True), Case(Shape(0, 8, 8, 2, 1))]


@contextmanager
def fixed_tilings() -> Iterator[None]:
    """Let kernels take their fixed default: timing tilings for a check's odd sizes would take its time many times over."""
    before = os.environ.get("LIGHTNING_MUE_AUTOTUNE")
    os.environ["LIGHTNING_MUE_AUTOTUNE"] = "0"
    try:
        yield
    finally:
        os.environ.pop("LIGHTNING_MUE_AUTOTUNE")
        if before is not None:
            os.environ["LIGHTNING_MUE_AUTOTUNE"] = before


def problem(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Routed, dict[str, Tensor]]:
    """A random input and the weights by name."""
    routed = random_routing(case.shape, dtype, device, case.kind)
    if case.masked:
        ids_TK = routed.expert_ids.clone()
        ids_TK[torch.randperm(case.shape.tokens, device=device)[: case.masked]] = case.shape.experts
        counts_E = torch.bincount(ids_TK.flatten(), minlength=case.shape.experts + 1)[:-1]
        routed = routed._replace(expert_ids=ids_TK, counts=counts_E)
    weights = Weights.random(case.shape, dtype, device)._asdict()
    if case.biases:
        bias = torch.randn(2, case.shape.experts, case.shape.hidden, device=device).to(dtype)
        weights |= {"b_gate": bias[0].clone().requires_grad_(), "b_up": bias[1].clone().requires_grad_()}
    if case.activation in ("gelu", "gelu-tanh", "relu2"):
        weights = {name: w for name, w in weights.items() if not name.endswith("gate")}
    return routed, weights


def exact(case: Case, routed: Routed, weights: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients of a loop over experts in float64, from the definition."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
    functions["relu2"] = lambda z: F.relu(z) ** 2
    w = {name: t.detach().double().requires_grad_() for name, t in weights.items()}
    x, gates = (t.detach().double().requires_grad_() for t in (routed.x, routed.gates))
    y = x * 0
    for e in range(case.shape.experts):
        token, slot = (routed.expert_ids == e).nonzero(as_tuple=True)
        z = x[token] @ w["w_up"][e].T + (w["b_up"][e] if "b_up" in w else 0)
        a = functions[case.activation](z)
        if "w_gate" in w:
            z_gate = x[token] @ w["w_gate"][e].T + (w["b_gate"][e] if "b_gate" in w else 0)
            a = functions[case.activation](z_gate) * z
        y = y.index_add(0, token, gates[token, slot, None] * (a @ w["w_down"][e].T))
    leaves = [x, gates, *(w[name[1:]] for name in TENSORS[3:] if name[1:] in w)]
    return [y.detach(), *torch.autograd.grad(y, leaves, routed.dy.double())]


def errors(name: str, backend: str, case: Case, device: torch.device) -> dict[str, float]:
    """Relative error of the output and of each gradient; `name` is one of PRECISIONS."""
    precision = PRECISIONS[name]
    routed, weights = problem(case, precision.dtype, device)
    leaves = [weights[name[1:]] for name in TENSORS[3:] if name[1:] in weights]
    with float32_products(precision.float32), poisoned_memory(), fixed_tilings():
        plan = plan_dispatch(routed.expert_ids, routed.counts, backend="torch")

        def forward(r: Routed) -> Tensor:
            return grouped_ffn(r.x, r.gates, plan=plan, activation=case.activation, backend=backend, **weights)

        found = Contender(forward, leaves).train(routed)
    expected = exact(case, routed, weights)
    names = [name for name in TENSORS if name in ("y", "dx", "dgates") or name[1:] in weights]
    return {
        # Of nothing there is no error; where nothing is expected, such as a gate's gradient of a masked token, all is.
        name: relative_error(value, right) if right.norm() else float(value.double().norm())
        for name, value, right in zip(names, found, expected, strict=True)
    }


def correctness(device: torch.device, smoke: bool, workers: int) -> Iterator[Row]:
    """Every backend in every type: the worst error of each tensor over all cases; a row more for a case that fails."""
    first, more = (SMOKE_CASES, SMOKE_MORE) if smoke else (CASES, MORE_CASES)
    names = [name for name in PRECISIONS if name != "tf32" or device.type == "cuda"]
    jobs = [
        (name, backend, case, device)
        for name in names
        for backend in BACKENDS
        for case in (*first, *(more if name in ("bfloat16", "float32") else []))
    ]
    results = in_parallel(errors, jobs, workers, seconds=60)
    for (name, backend), group in groupby(results, key=lambda result: result[0][:2]):
        row: Row = {"backend": backend, "type": name}
        found = [(job[2], values) for job, values in group]
        failed = [(case, values) for case, values in found if not _within(values, PRECISIONS[name].error)]
        if all("missing" in values for _, values in found):
            yield {**row, **found[0][1]}
            continue
        yield from ({**row, "case": str(case), **values, "ok": False} for case, values in failed)
        measured = [values for _, values in found if not {"error", "missing"} & set(values)]
        worst = {
            key: max(values.get(key, 0.0) for values in measured) for key in TENSORS if any(key in v for v in measured)
        }
        yield {**row, "case": f"{len(found) - len(failed)} of {len(found)} cases", **worst, "ok": not failed}


def _within(values: Row, bound: float) -> bool:
    return all(isinstance(value, float) and value <= bound for value in values.values())


class RoutingCase(NamedTuple):
    """A router to check; `ties`: logits take few values, `bias`: a balance bias takes part in the selection."""

    tokens: int
    experts: int
    top_k: int
    scoring: str
    gate: str = "linear"
    n_groups: int = 1
    n_sequences: int = 1
    masked: bool = False
    ties: bool = False
    bias: bool = False


def routing_cases(smoke: bool) -> list[RoutingCase]:
    """All scorings and gates, groups, masks, ties."""
    t = 24 if smoke else 8192
    e, k = (8, 2) if smoke else (128, 8)
    return [
        RoutingCase(t, e, k, "softmax-topk"),
        RoutingCase(t, e, k, "topk-softmax", "sqrt", masked=True),
        RoutingCase(t, e, k, "sigmoid", bias=True),
        RoutingCase(t, e, k, "sigmoid-normalized", "sqrt", n_groups=2, n_sequences=4),
        RoutingCase(t, e, k, "softmax-topk", ties=True),
        RoutingCase(t + 5, 6 if smoke else 60, 3, "topk-softmax", "sqrt", n_sequences=1, bias=True),
    ]


def routing(device: torch.device, smoke: bool) -> Iterator[Row]:
    """The kernels for routing and sorting against plain PyTorch: the same experts, counts and rows, and the same gates."""
    for case in routing_cases(smoke):
        try:
            yield {"case": _named(case), **_routing_differences(case, device)}
        except ImportError as error:
            yield {"case": _named(case), **failure(error)}
            return
        except Exception as error:
            yield {"case": _named(case), **failure(error)}


def _named(case: RoutingCase) -> str:
    sizes = (f"{key} {value}" for key, value in case._asdict().items() if not isinstance(value, bool) and value != 1)
    return ", ".join([*sizes, *(key for key, value in case._asdict().items() if value is True)])


def _routing_differences(case: RoutingCase, device: torch.device) -> Row:
    from lightning_mue.kernels.routing.op import route

    logits_TE = torch.randn(case.tokens, case.experts, device=device)
    logits_TE = (logits_TE * 2).round() / 2 if case.ties else logits_TE
    bias_E = torch.randn(case.experts, device=device) * 0.01 * case.bias
    mask_T = torch.rand(case.tokens, device=device) < 0.9 if case.masked else None
    options = {"n_groups": case.n_groups, "mask_T": mask_T, "n_sequences": case.n_sequences}
    results = {}
    for backend in ("triton", "torch"):
        leaf_TE = logits_TE.clone().requires_grad_()
        generator = torch.Generator(device).manual_seed(1)
        with poisoned_memory():
            routed = route(
                leaf_TE, bias_E, top_k=case.top_k, scoring=case.scoring, gate=case.gate, backend=backend, **options
            )
            smooth = (routed.gates, routed.probability_sum, routed.z_sum)
            upstream = [torch.randn(t.shape, device=device, generator=generator) for t in smooth]
            grad = torch.autograd.grad(smooth, leaf_TE, upstream)[0]
            plan = plan_dispatch(routed.expert_ids, routed.counts.sum(0), backend=backend)
        results[backend] = routed, plan, [*(t.detach() for t in smooth), grad]
    (ours, our_plan, our_values), (twin, twin_plan, twin_values) = results["triton"], results["torch"]
    moved = int((ours.expert_ids != twin.expert_ids).any(1).sum())
    # exp is rounded differently on the two, so that a bias may turn a tie in the last bit; without one, order is order.
    allowed = case.tokens // 1000 if case.bias else 0
    row: Row = {"tokens routed differently": moved, "counts equal": torch.equal(ours.counts, twin.counts)}
    row["plan equal"] = plans_equal(our_plan, twin_plan)
    row["ok"] = moved <= allowed and (moved > 0 or (row["counts equal"] is True and row["plan equal"] is True))
    names = ("gates", "probability_sum", "z_sum", "dlogits")
    for name, mine, other in zip(names, our_values, twin_values, strict=True):
        error = relative_error(mine, other.double())
        row[name] = error
        row["ok"] = row["ok"] and (error <= 1e-5 or moved > 0)
    return row


def plans_equal(a: DispatchPlan, b: DispatchPlan) -> bool:
    """Whether two plans are the same, number by number."""
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("order", "inverse", "tokens", "offsets"))


def repeated(device: torch.device, smoke: bool) -> Iterator[Row]:
    """Bits that repeat, no wait for the host, and a CUDA graph of forward and backward."""
    shape = Shape(12, 16, 16, 2, 1) if smoke else Shape(8192, 1024, 512, 32, 4)
    weights = Weights.random(shape, torch.bfloat16, device)
    for backend, make in contenders(shape, weights).items():
        if backend not in BACKENDS:
            continue
        row: Row = {"backend": backend}
        try:
            with fixed_tilings():
                contender = make()
                row["same bits again"] = row["ok"] = _repeats(contender, shape, device)
                # Plain PyTorch asks the device for the counts; it is for the CPU.
                if device.type == "cuda" and backend != "torch":
                    row["waits for the host"] = waits = _waits(contender, shape, device)
                    row["graph same as a call"] = same = captured(contender, shape, torch.bfloat16, device)
                    row["ok"] = row["ok"] and not waits and same
        except Exception as error:
            row |= failure(error)
        yield row


def _repeats(contender: Contender, shape: Shape, device: torch.device) -> bool:
    routed = random_routing(shape, torch.bfloat16, device, "hot")
    first = contender.train(routed)
    contender.train(random_routing(shape, torch.bfloat16, device))
    again = contender.train(routed)
    return all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _waits(contender: Contender, shape: Shape, device: torch.device) -> bool:
    routed = random_routing(shape, torch.bfloat16, device)
    contender.train(routed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contender.train(routed)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(contender: Contender, shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    """Capture forward and backward in a CUDA graph; whether a replay on another input and routing gives what a call gives."""
    routed = random_routing(shape, dtype, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            contender.train(routed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = contender.train(routed)
    with torch.no_grad():
        for held, new in zip(routed, random_routing(shape, dtype, device, "everybody"), strict=True):
            held.copy_(new)
        for result in results:
            if result is not None:
                result.fill_(torch.nan)
    graph.replay()
    called = contender.train(routed)
    return all(torch.equal(a, b) for a, b in zip(results, called, strict=True) if a is not None and b is not None)


def checks(device: torch.device, smoke: bool, workers: int) -> dict[str, Callable[[Report], Iterator[Row]]]:
    """The sections of this module."""
    return {
        "Errors against float64": lambda report: correctness(device, smoke, workers),
        "Routing against plain PyTorch": lambda report: routing(device, smoke),
        "Repeated and captured": lambda report: repeated(device, smoke),
    }
