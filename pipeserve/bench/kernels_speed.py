"""How fast attention, the fused small kernels and sampling run on this GPU, in the 8B shape.

`python -m pipeserve.bench.kernels_speed [decode prefill fused sampling]` prints one line per
measurement. Times are medians of CUDA graph replays over several sets of inputs, so that launches
cost what they cost in service and the cache does not hold what is read. Shares are of the copy
speed (bytes read plus written) and the bf16 matmul rate measured in the same run.

Shapes: T tokens, S sequences, N query heads, K kv heads, H head dim, B blocks, P position in
block, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.bench.ceilings import Ceilings, measure_ceilings
from pipeserve.kernels import fused, rotary, sampling
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.attention_prefill import paged_attention_prefill
from pipeserve.kernels.sampling_logprobs import log_probs

N, K, H, P = 32, 8, 128, 16
D, F, V = 4096, 14336, 128256
SCALE = H**-0.5
CACHE_BYTES = 3 * 10**9
DEVICE = torch.device("cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    k_BPKH: Tensor
    v_BPKH: Tensor
    k_scale_BKP: Tensor | None = None
    v_scale_BKP: Tensor | None = None


def microseconds(call: Callable[[int], object], num_sets: int, *, repeats: int = 15) -> float:
    """Of one call; call(i) uses the i-th set of inputs."""
    for index in range(num_sets):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(num_sets):
            call(index)
    times_ms: list[float] = []
    for _ in range(repeats + 1):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms[1:]) * 1000 / num_sets


def make_layer(num_blocks: int, kv: torch.dtype) -> Layer:
    shape = (num_blocks, P, K, H)
    if kv != torch.int8:
        k, v = (torch.randn(shape, device=DEVICE, dtype=kv) for _ in "kv")
        return Layer(k_BPKH=k, v_BPKH=v)
    k, v = (torch.randint(-127, 128, shape, device=DEVICE, dtype=torch.int8) for _ in "kv")
    k_scale, v_scale = torch.rand(2, num_blocks, K, P, device=DEVICE).half() * 0.01 + 0.01
    return Layer(k_BPKH=k, v_BPKH=v, k_scale_BKP=k_scale, v_scale_BKP=v_scale)


def bench_decode(ceilings: Ceilings) -> None:
    for kv in (torch.float16, torch.int8):
        for num_seqs in (1, 16, 128):
            for length in (512, 2048, 8192):
                decode_line(ceilings, kv, num_seqs, length)


def decode_line(ceilings: Ceilings, kv: torch.dtype, num_seqs: int, length: int) -> None:
    per_token = 2 * K * (H * kv.itemsize + (2 if kv == torch.int8 else 0))
    num_bytes = num_seqs * length * per_token
    num_blocks = num_seqs * length // P
    layers = [make_layer(num_blocks, kv) for _ in range(max(1, min(32, CACHE_BYTES // num_bytes)))]
    table_SB = torch.randperm(num_blocks, device=DEVICE).view(num_seqs, -1).int()
    lengths_S = torch.full((num_seqs,), length, device=DEVICE, dtype=torch.int32)
    q_SNH = torch.randn(num_seqs, N, H, device=DEVICE, dtype=torch.float16)
    out_SNH = torch.empty_like(q_SNH)

    def attend(index: int) -> Tensor:
        layer = layers[index % len(layers)]
        return paged_attention_decode(
            q_SNH,
            layer.k_BPKH,
            layer.v_BPKH,
            table_SB,
            lengths_S,
            SCALE,
            k_scale_BKP=layer.k_scale_BKP,
            v_scale_BKP=layer.v_scale_BKP,
            out_SNH=out_SNH,
        )

    us = microseconds(attend, max(8, len(layers)))
    share = num_bytes / us * 1e6 / ceilings.copy_bytes_per_s
    print(
        f"decode  {kv} S={num_seqs} length={length}: {us:.1f} us, {share:.1%} of copy", flush=True
    )


def bench_prefill(ceilings: Ceilings) -> None:
    for num_seqs, length in ((8, 512), (1, 8192)):
        times_us = {"torch sdpa, not paged": sdpa_microseconds(num_seqs, length)}
        for kv in (torch.bfloat16, torch.int8):
            times_us[str(kv)] = prefill_microseconds(kv, num_seqs, length)
        flops = 4 * N * H * num_seqs * length * (length + 1) / 2
        for name, us in times_us.items():
            rate = flops / us * 1e6
            share = f"{rate / 1e12:.0f} TFLOP/s, {rate / ceilings.matmul_flops_per_s:.1%}"
            print(f"prefill {name} {num_seqs}x{length}: {us:.1f} us, {share}", flush=True)


def sdpa_microseconds(num_seqs: int, length: int) -> float:
    q, k, v = (
        torch.randn(num_seqs, heads, length, H, device=DEVICE, dtype=torch.bfloat16)
        for heads in (N, K, K)
    )
    return microseconds(
        lambda _: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        4,
    )


def prefill_microseconds(kv: torch.dtype, num_seqs: int, length: int) -> float:
    layer = make_layer(num_seqs * length // P, kv)
    table_SB = torch.randperm(num_seqs * length // P, device=DEVICE).view(num_seqs, -1).int()
    first_S = torch.zeros(num_seqs, device=DEVICE, dtype=torch.int32)
    num_tokens_S = torch.full_like(first_S, length)
    activation = torch.float16 if kv == torch.int8 else kv
    q_TNH = torch.randn(num_seqs * length, N, H, device=DEVICE, dtype=activation)
    out_TNH = torch.empty_like(q_TNH)
    return microseconds(
        lambda _: paged_attention_prefill(
            q_TNH,
            layer.k_BPKH,
            layer.v_BPKH,
            table_SB,
            first_S,
            num_tokens_S,
            SCALE,
            k_scale_BKP=layer.k_scale_BKP,
            v_scale_BKP=layer.v_scale_BKP,
            out_TNH=out_TNH,
        ),
        4,
    )


def bench_fused(num_tokens: int) -> None:
    def sets(*shape: int) -> list[Tensor]:
        return [
            torch.randn(num_tokens, *shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(32)
        ]

    def turn(index: int, layer: Layer) -> Tensor:
        return rotary.rotary_and_cache(
            qkv[index],
            cos_TR,
            sin_TR,
            layer.k_BPKH,
            layer.v_BPKH,
            slots_T,
            q_TNH=q_TNH,
            k_scale_BKP=layer.k_scale_BKP,
            v_scale_BKP=layer.v_scale_BKP,
        )

    x, gate_up, qkv = sets(D), sets(2 * F), sets(N + 2 * K, H)
    weight_D = torch.randn(D, device=DEVICE, dtype=torch.bfloat16)
    residual_TD, out_TD = torch.randn_like(x[0]), torch.empty_like(x[0])
    out_TF = torch.empty(num_tokens, F, device=DEVICE, dtype=torch.bfloat16)
    q_TNH = torch.empty(num_tokens, N, H, device=DEVICE, dtype=torch.bfloat16)
    cos_TR, sin_TR = torch.randn(2, num_tokens, H, device=DEVICE)
    slots_T = torch.randperm(64 * P, device=DEVICE)[:num_tokens]
    plain, quantised = make_layer(64, torch.bfloat16), make_layer(64, torch.int8)
    calls: dict[str, Callable[[int], object]] = {
        "rms_norm": lambda i: fused.rms_norm(x[i], weight_D, 1e-5, out_TD=out_TD),
        "add_rms_norm": lambda i: fused.add_rms_norm(
            x[i], residual_TD, weight_D, 1e-5, out_TD=out_TD, sum_TD=residual_TD
        ),
        "swiglu": lambda i: fused.swiglu(gate_up[i], out_TF=out_TF),
        "rotary_and_cache": lambda i: turn(i, plain),
        "rotary_and_cache int8": lambda i: turn(i, quantised),
    }
    for name, call in calls.items():
        print(f"fused   {name} T={num_tokens}: {microseconds(call, 32):.2f} us", flush=True)


def bench_sampling(num_rows: int, spread: float) -> None:
    """The spread of the logits decides how many tokens top-p keeps: few, thousands or most."""

    def filtered(index: int, top_k_S: Tensor) -> Tensor:
        return sampling.sample_filtered(
            sets[index], temperature_S, top_k_S, top_p_S, min_p_S, uniform_S, out_S=ids_S
        )

    sets = [torch.randn(num_rows, V, device=DEVICE) * spread for _ in range(4)]
    temperature_S = torch.full((num_rows,), 0.8, device=DEVICE)
    top_p_S, min_p_S = torch.full_like(temperature_S, 0.9), torch.zeros_like(temperature_S)
    uniform_S = torch.rand(num_rows, dtype=torch.float64, device=DEVICE)
    ids_S = torch.empty(num_rows, dtype=torch.int64, device=DEVICE)
    all_S = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    top_50_S, top_all_S = torch.full_like(all_S, 50), torch.full_like(all_S, V)
    calls: dict[str, Callable[[int], object]] = {
        "greedy": lambda i: sampling.greedy(sets[i], out_S=ids_S),
        "torch argmax": lambda i: sets[i].argmax(-1),
        "plain": lambda i: sampling.sample(sets[i], temperature_S, min_p_S, uniform_S, out_S=ids_S),
        "top-k 50, top-p 0.9": lambda i: filtered(i, top_50_S),
        "top-p 0.9": lambda i: filtered(i, top_all_S),
        "20 log-probabilities": lambda i: log_probs(sets[i], ids_S, all_S, 20),
    }
    for name, call in calls.items():
        us = microseconds(call, len(sets))
        print(f"sampling {name} S={num_rows} spread={spread:.0f}: {us:.1f} us", flush=True)


def main() -> None:
    parts = ("decode", "prefill", "fused", "sampling")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=parts, metavar=" | ".join(parts))
    chosen = parser.parse_args().parts
    torch.manual_seed(0)
    ceilings = measure_ceilings(torch.device("cuda", torch.cuda.current_device()))
    print(
        f"{torch.cuda.get_device_name()}: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 matmul {ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    if "decode" in chosen:
        bench_decode(ceilings)
    if "prefill" in chosen:
        bench_prefill(ceilings)
    if "fused" in chosen:
        for num_tokens in (1, 32, 256):
            bench_fused(num_tokens)
    if "sampling" in chosen:
        for num_rows in (1, 32, 256):
            for spread in (6.0, 3.0, 1.0):
                bench_sampling(num_rows, spread)


if __name__ == "__main__":
    main()
