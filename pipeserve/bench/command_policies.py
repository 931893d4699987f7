"""`bench policies` and `bench prediction` on the command line. Import no torch before they run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeserve.arguments import HTTP_OPTIONS, add_options, count, counts
from pipeserve.bench.arrivals import Lengths
from pipeserve.bench.command_engine import add_model, configure
from pipeserve.bench.policies import POLICIES, choose_policies
from pipeserve.bench.policy_loads import (
    LOADS,
    choose_loads,
    default_clients,
    default_shorter,
    longest_sequence,
)
from pipeserve.bench.workload import LEAST_ROWS
from pipeserve.config import Config

POLICIES_EPILOG = """\
Everything runs on one pipeline, one run after the other. Where a stage is on a CPU all lengths are
an eighth (--shorter 8). Loads, prompt + output tokens:

  uniform   512 + 128, clients in a closed loop
  varied    512 + 64 to 256
  mixed     64 to 8192 + 64 to 256, for twice --seconds
  poisson   512 + 128, arriving at 0.8 of the rate that uniform showed first
  shared    512 + 128, of which all prompts share the first 448
  tight     512 + 64 to 1024, in a KV cache for a quarter of the clients

Policies: """ + ", ".join(POLICIES)
POLICIES_EPILOG += """.

examples:
  pipeserve bench policies --model demo --devices cpu,cpu
  pipeserve bench policies --shape llama-8b --devices cuda:0,cuda:1
  pipeserve bench policies --model demo --devices cpu,cpu --loads varied --rounds 3 \\
      --policies ours,plain"""

PREDICTION_EPILOG = """\
Each load is run and recorded, and each is foretold from costs that are fitted to each.

examples:
  pipeserve bench prediction --model demo --devices cpu,cpu --clients 4,8
  pipeserve bench prediction --shape llama-8b --devices cuda:0,cuda:1 --clients 256,512"""


def add_policies(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    policies = benchmarks.add_parser(
        "policies",
        help="what each part of the scheduler is worth, on real stages",
        description="Compare the scheduler with a plain one and with itself without one part, in "
        "wall time, and print a Markdown table.",
        epilog=POLICIES_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    policies.set_defaults(run=run_policies)
    add_model(policies)
    add = policies.add_argument
    names = ",".join(load.name for load in LOADS)
    add("--loads", default=names, metavar="LIST", help=f"Default: {names}.")
    add("--policies", metavar="LIST", help="under every load. Default: those that it tells apart.")
    add("--clients", type=count, metavar="N", help="Default: 8 for each CPU stage, 128 on GPUs.")
    add("--shorter", type=count, metavar="N", help="divides all lengths. Default: 8 on CPUs, or 1.")
    add("--seconds", type=float, default=8.0, metavar="S", help="of a run. Default: 8.")
    add("--rounds", type=count, default=1, metavar="N", help="runs of each. Default: 1.")
    _add_common(policies)


def add_prediction(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prediction = benchmarks.add_parser(
        "prediction",
        help="whether the simulator foretells real stages",
        description="Fit the simulator to one real run and hold what it foretells of another "
        "against that.",
        epilog=PREDICTION_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prediction.set_defaults(run=run_prediction)
    add_model(prediction)
    add = prediction.add_argument
    add("--clients", type=counts, required=True, metavar="LIST", help="of each load")
    add("--prompt", default="512", metavar="LENGTHS", help="prompt tokens. Default: 512.")
    add("--output", default="128", metavar="LENGTHS", help="output tokens. Default: 128.")
    add("--seconds", type=float, default=15.0, metavar="S", help="of a run. Default: 15.")
    add("--record", type=Path, metavar="FILE", help="append the runs to it, for bench schedule")
    _add_common(prediction)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_options(
        parser, [name for name in Config.model_fields if name not in {"model", *HTTP_OPTIONS}]
    )


def run_policies(parsed: argparse.Namespace) -> int:
    """The command `bench policies`."""
    loads = choose_loads(parsed.loads)
    policies = None if parsed.policies is None else choose_policies(parsed.policies)
    num_clients, shorter = parsed.clients, parsed.shorter

    def missing(config: Config) -> dict[str, int]:
        nonlocal num_clients, shorter
        devices = _devices(config)
        num_clients = num_clients or default_clients(devices)
        shorter = shorter or default_shorter(devices)
        return _room(config, num_clients, longest_sequence(loads, shorter))

    config = configure(parsed, missing)
    from pipeserve.bench import policy_report, policy_runs  # load torch

    options = policy_runs.Options(
        loads=loads,
        policies=policies,
        num_clients=num_clients,
        shorter=shorter,
        run_s=parsed.seconds,
        num_rounds=parsed.rounds,
    )
    result = policy_runs.compare(
        config,
        options,
        on_case=lambda case: print(policy_report.progress_line(case), file=sys.stderr),
    )
    print(policy_report.as_json(result) if parsed.json else policy_report.as_markdown(result))
    return 0


def run_prediction(parsed: argparse.Namespace) -> int:
    """The command `bench prediction`."""
    prompt, output = Lengths.parse(parsed.prompt), Lengths.parse(parsed.output)

    def missing(config: Config) -> dict[str, int]:
        return _room(config, max(parsed.clients), prompt.longest + output.longest)

    config = configure(parsed, missing)
    from pipeserve.bench import prediction  # loads torch

    options = prediction.Options(
        clients=parsed.clients,
        prompt=prompt,
        output=output,
        run_s=parsed.seconds,
        record=parsed.record,
    )
    predictions = prediction.measure(
        config, options, on_run=lambda run: print(f"ran {run.about}", file=sys.stderr)
    )
    print((prediction.as_json if parsed.json else prediction.as_markdown)(predictions))
    return 0


def _devices(config: Config) -> list[str]:
    """Of all stages."""
    from pipeserve.runtime.devices import resolve_devices  # loads torch

    return [str(each) for each in resolve_devices(config.devices, num_layers=sys.maxsize)]


def _room(config: Config, num_clients: int, num_tokens: int) -> dict[str, int]:
    """Rows for all clients and context for their sequences, where nobody said."""
    wanted = {"max_num_seqs": max(LEAST_ROWS, num_clients), "context_length": max(16, num_tokens)}
    return {name: value for name, value in wanted.items() if getattr(config, name) is None}
