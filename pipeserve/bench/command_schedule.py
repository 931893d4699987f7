"""`bench schedule` on the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from pipeserve.arguments import count, counts
from pipeserve.bench.policies import POLICIES

BENCH_SCHEDULE_EPILOG = """\
The costs are microseconds of the whole model, which --split cuts into stages: per step, per row
that samples, per prefill token, per KV position that a row reads and, if given, per prefill token
and position that it attends to. Those of an 8B Llama on an H200 are the default. Lengths are a
number (512), some of equal chance (64,2048) or a range (64-8192, log-uniform). A trace file has one
JSON object per line: arrival_s, prompt_tokens, output_tokens and, if wanted, key and priority.

examples:
  pipeserve bench schedule --clients 128
  pipeserve bench schedule --clients 256 --split 1,1,1,1 --prompt 64-8192 --timeline stages.svg
  pipeserve bench schedule --poisson 40 --requests 2000 --split 3,2
  pipeserve bench engine --model demo --devices cpu,cpu --clients 4 --record one.jsonl
  pipeserve bench engine --model demo --devices cpu,cpu --clients 12 --record other.jsonl
  pipeserve bench schedule --fit one.jsonl --replay other.jsonl"""


def add_schedule(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    schedule = benchmarks.add_parser(
        "schedule",
        help="the scheduler on simulated stages, in virtual time",
        description="Send requests through the scheduler and stages of known costs; no model.",
        epilog=BENCH_SCHEDULE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    schedule.set_defaults(run=run_schedule)
    add = schedule.add_argument
    load = schedule.add_mutually_exclusive_group(required=True)
    load.add_argument("--clients", type=count, metavar="N", help="a closed loop of N clients")
    load.add_argument("--poisson", type=float, metavar="RATE", help="so many arrivals per second")
    load.add_argument("--bursts", metavar="N/S", help="N arrivals at once every S seconds")
    load.add_argument("--trace", type=Path, metavar="FILE", help="requests from a file")
    load.add_argument("--replay", type=Path, metavar="FILE", help="recorded runs, to compare with")
    add("--requests", type=count, metavar="N", help="Default: 4 for each client, or 1000.")
    add("--prompt", default="512", metavar="LENGTHS", help="prompt tokens. Default: 512.")
    add("--output", default="128", metavar="LENGTHS", help="output tokens. Default: 128.")
    add("--seed", type=int, default=0, metavar="N", help="of lengths and arrivals. Default: 0.")
    costs = schedule.add_mutually_exclusive_group()
    costs.add_argument("--fit", type=Path, metavar="FILE", help="take costs from recorded runs")
    costs.add_argument("--costs", metavar="LIST", help="of the whole model. Default: 8B on an H200")
    add("--split", type=counts, metavar="LIST", help="the stages' shares of it. Default: 1,1.")
    add(
        "--policies",
        default="ours,plain",
        metavar="LIST",
        help=f"of {', '.join(POLICIES)}. Default: ours,plain.",
    )
    add("--max-num-seqs", type=count, metavar="N", help="Default: 256, or as recorded.")
    add("--max-num-batched-tokens", type=count, metavar="N", help="Default: 2048, or as recorded.")
    add("--kv-tokens", type=count, metavar="N", help="Default: 262144, or as recorded.")
    add("--num-look-ahead", type=int, choices=(0, 1), help="Default: 1, or as recorded.")
    add(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="draw which stage worked on which micro-batch under the first policy, as SVG",
    )
    add("--json", action="store_true", help="print JSON instead of tables")


def run_schedule(parsed: argparse.Namespace) -> int:
    """The command `bench schedule`."""
    from pipeserve.bench import schedule, schedule_report

    result = schedule.run(
        schedule.Options(
            **{
                field.name: getattr(parsed, field.name)
                for field in dataclasses.fields(schedule.Options)
            }
        )
    )
    print(schedule_report.as_json(result) if parsed.json else schedule_report.as_text(result))
    if parsed.timeline is not None:
        parsed.timeline.write_text(schedule_report.as_svg(result.simulated[0]))
    return 0
