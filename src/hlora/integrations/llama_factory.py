"""LLaMA-Factory: its training, started with one callback more.

    python -m hlora.integrations.llama_factory general.yaml --record runs/general/importance
    python -m hlora.integrations.llama_factory domain.yaml --importance runs/general/importance --phi 1.0

What follows the configuration goes to LLaMA-Factory, such as `learning_rate=1e-4`. On several GPUs start it by
torchrun.
"""

from __future__ import annotations

import argparse
import sys

from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

import hlora


def train(arguments: list[str], callback: TrainerCallback) -> None:
    """`llamafactory-cli train` with `arguments`, a configuration and what replaces its fields, and one callback."""
    sys.argv[1:] = arguments  # where LLaMA-Factory reads them
    run_exp(callbacks=[callback])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hlora.integrations.llama_factory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", help="directory to save importance to")
    what.add_argument("--importance", help="importance to protect: a directory, or a hub repository")
    parser.add_argument("--method", default="squared_gradients", choices=("squared_gradients", "path_integral"))
    parser.add_argument("--unprotected", default="refuse", choices=("refuse", "warn"), help="of parts beside LoRA")
    parser.add_argument("--phi", type=float, help="weight of the penalty")
    ours, theirs = parser.parse_known_args()
    if (ours.importance is None) != (ours.phi is None):
        parser.error("--importance and --phi go together")
    if ours.record is not None:
        train(theirs, hlora.RecordCallback(ours.record, method=ours.method, unprotected=ours.unprotected))
    else:
        train(theirs, hlora.ProtectCallback(ours.importance, ours.phi))


if __name__ == "__main__":
    main()
