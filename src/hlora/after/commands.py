"""The commands for what comes after a run: merge, chat, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hlora.system.errors import ConfigError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Output directory of a run.")]
ModelOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the model: --set model.device=cpu"),
]


def merge(
    run: Run,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory for the merged model.")],
    overrides: ModelOverrides = None,
) -> None:
    """Merge the adapter of a run into its base model: an ordinary model directory with its tokenizer.

    The merged model is loaded again and its logits compared with the adapter's. Where they differ, nothing is written.
    """
    from hlora.after.merge import merge

    found = merge(run, directory, overrides)
    typer.echo(
        f"logits: off by {found.error:.1e} of their size (bound {found.bound:.0e}, {found.precision}); the tuning "
        f"changed them by {found.effect:.1e}"
    )
    typer.echo(f"merged model: {found.directory}")


def chat(
    run: Run,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the base model, too.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each line as plain text, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy. Above: sampling.")] = 0.0,
    overrides: ModelOverrides = None,
) -> None:
    """Talk to the tuned model of a run. Reads stdin line by line; Ctrl-D or Ctrl-C ends."""
    from hlora.after.chat import chat
    from hlora.after.tuned import load_tuned, model_config

    config = model_config(run, overrides)
    chat(load_tuned(run, config), compare, plain, max_new_tokens, temperature)


def push(
    artefact: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="An importance or an adapter: runs/mine/adapter.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the hub: user/name. Made if it is new.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence for the card, such as apache-2.0.")
    ] = None,
) -> None:
    """Upload an importance or an adapter to the hub, with its card. Log in first: hf auth login."""
    from hlora.after.push import push_adapter
    from hlora.importance.artefact import Importance
    from hlora.report.card import public_card

    if (artefact / "importance.json").is_file():
        readme = artefact / "README.md"  # with the measurements of the run, which the importance does not know
        card = public_card(readme.read_text(encoding="utf-8")) if readme.is_file() else None
        address = Importance.load(artefact).push_to_hub(repo, private=private, license=licence, card=card)
    elif (artefact / "adapter_config.json").is_file():
        address = push_adapter(artefact, repo, private=private, licence=licence)
    else:
        raise ConfigError(
            f"{artefact}: expected an importance or an adapter, the directory with its files. Of a run, name "
            f"{artefact / 'importance'} or {artefact / 'adapter'}."
        )
    typer.echo(f"uploaded: {address}")
