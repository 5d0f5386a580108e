"""The card (README.md) of an artefact: what it is, what it was made from, what was measured, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import yaml

from hlora import __version__
from hlora.report.run.summary import summary_rows
from hlora.report.run.verdict import verdict
from hlora.system.redaction import redact_text, without_paths

PLACE = "PATH/OF/THIS/DIRECTORY"
"""What a card on this machine calls its own place; `hlora push` puts the repository there."""

_NO_LICENCE = "Not stated. Whoever passes this on decides, within the licences of the base model and the data."
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_APACHE = {"smollm2-135m": "apache-2.0"}  # the embedded base model's


def adapter_card(results: Mapping[str, Any]) -> str:
    """The card of a tuned adapter.

    Args:
        results: what results.json holds. Without `arms`, as before the evaluation, the card has no measurements.
    """
    config, data = _part(results, "config"), _part(_part(results, "provenance"), "data")
    base = public_name(_text(_part(config, "model").get("name")))
    steps = [_trained_on(config, data), f"Held by {_importance(config, results)}."]
    sections = {
        "What this is": [
            f"A LoRA adapter (PEFT) for {base}, tuned on one domain under hlora's penalty against forgetting.",
            *_lora(_part(config, "lora")),
        ],
        "How it was made": steps,
        "What was forgotten and learned": _measured(results),
        "How to load it": [_load_adapter(base)],
    }
    return _card(f"LoRA adapter for {base}", "adapter", base, "peft", sections)


def merged_card(results: Mapping[str, Any], dtype: str) -> str:
    """The card of a base model with a tuned adapter merged into it."""
    config, data = _part(results, "config"), _part(_part(results, "provenance"), "data")
    base = public_name(_text(_part(config, "model").get("name")))
    sections = {
        "What this is": [
            f"{base} with a LoRA adapter merged into it, in {dtype}. The adapter was tuned on one domain under hlora's "
            "penalty against forgetting.",
        ],
        "How it was made": [_trained_on(config, data), f"Held by {_importance(config, results)}."],
        "What was forgotten and learned": _measured(results),
        "How to load it": [
            "```python\nfrom transformers import pipeline\n"
            f'generate = pipeline("text-generation", model="{PLACE}")\n```'
        ],
    }
    return _card(f"{base}, tuned", "finetune", base, "transformers", sections)


def importance_card(document: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> str:
    """The card of an importance.

    Args:
        document: what importance.json holds.
        results: of the run that recorded it, for the measurements of its general adapter.
    """
    provenance, lora = _part(document, "provenance"), _part(document, "lora_config")
    base = public_name(_text(provenance.get("base_model")))
    method = _text(provenance.get("method", "path_integral")).replace("_", " ")
    general = {"r": lora.get("r"), "lora_alpha": lora.get("lora_alpha"), "target_modules": lora.get("target_modules")}
    how = [f"Recorded by {method} {_general(_part(provenance, 'data'))}."]
    if "steps" in provenance:
        damping = f", ξ = {provenance['xi']}" if "xi" in provenance else ""  # of a path integral
        how.append(f"{provenance['steps']} optimizer steps{damping}.")
    sections = {
        "What this is": [
            f"How important each weight of {base} is for general text, by matrix ({document.get('encoding')}), and "
            "the general adapter where the recording ended. One importance serves any number of domains: hlora holds a "
            "LoRA fine-tuning by it, so that the model forgets less.",
            "LoRA of the recording: " + ", ".join(f"{k} {_shown(v)}" for k, v in general.items() if v) + ".",
        ],
        "How it was made": how,
        "What was measured": _of_general_phase(results or {}),
        "How to load it": [
            f'```python\nimport hlora\nhlora.protect(trainer, "{PLACE}", phi=1.0)\n```',
            "`trainer` is a Trainer or SFTTrainer whose model has LoRA as above; call `trainer.train()` next. On the "
            f"command line: `hlora run my.yaml --importance {PLACE}`.",
        ],
    }
    return _card(f"Importance of {base}", None, base, "hlora", sections)


def named_card(card: str, repo: str, licence: str | None) -> str:
    """The card for a repository: its name in place of the directory's, and the licence, where one is given."""
    card = card.replace(PLACE, repo)
    if licence is None:
        return card
    card = re.sub(r"(?m)^(## Licence\n\n).*$", rf"\g<1>{licence}", card, count=1)
    head, body = _parts(card)
    return f"---\n{_yaml({**head, 'license': licence})}---\n{body}"


def public_card(card: str) -> str:
    """A card without paths of this machine; PEFT and TRL write that of the base model into the head."""
    head, body = _parts(card)
    models = head.pop("base_model", [])
    if public := [name for name in _list(models) if _is_hub_name(_text(name))]:
        head["base_model"] = public if isinstance(models, list) else public[0]
    if "tags" in head:
        head["tags"] = [tag for tag in _list(head["tags"]) if _names_no_place(_text(tag))]
    shown = f"---\n{_yaml(without_paths(head))}---\n" if head else ""
    return redact_text(shown + without_paths(body))


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """The fields in a card's head, and the text below them. A head that is no YAML mapping is text."""
    head, separator, body = card.removeprefix("---\n").partition("\n---\n")
    if separator and card.startswith("---\n"):
        with suppress(yaml.YAMLError):
            fields = yaml.safe_load(head)
            if isinstance(fields, dict):
                return fields, body
    return {}, card


def _names_no_place(tag: str) -> bool:
    """Whether a tag, such as base_model:adapter:NAME, names no directory of this machine."""
    name = tag.rpartition(":")[2]
    return _is_hub_name(name) or not ({"/", "\\"} & {*tag} or Path(name).is_dir())


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and public_name(name) == name


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def public_name(name: str) -> str:
    """A model or data set as others know it: the name on the hub, or the last part of a path."""
    if _HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    return PurePath(name).name or "an unnamed model"


def _card(title: str, relation: str | None, base: str, library: str, sections: Mapping[str, Iterable[str]]) -> str:
    licence = _APACHE.get(base)
    facts: dict[str, Any] = {"library_name": library, "tags": ["hlora", "lora", "continual-learning"]}
    if _HUB_NAME.fullmatch(base):
        facts["base_model"] = base
        facts |= {"base_model_relation": relation} if relation else {}
    if relation:
        facts["pipeline_tag"] = "text-generation"
    if licence:
        facts["license"] = licence
    body = [f"# {title}"]
    for heading, paragraphs in sections.items():
        body += [f"## {heading}", *paragraphs]
    body += ["## Licence", f"{licence} (the base model's)." if licence else _NO_LICENCE]
    body.append(f"Written by hlora {__version__}.")
    return redact_text(f"---\n{_yaml(facts)}---\n\n" + without_paths("\n\n".join(body)) + "\n")


def _yaml(facts: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)


def _load_adapter(base: str) -> str:
    if _HUB_NAME.fullmatch(base):
        line = f'model = AutoPeftModelForCausalLM.from_pretrained("{PLACE}")'
        return f"```python\nfrom peft import AutoPeftModelForCausalLM\n{line}\n```"
    return (
        f'```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base, "{PLACE}")\n```\n\n'
        f"`base` is {base}, loaded by Transformers."
    )


def _lora(lora: Mapping[str, Any]) -> list[str]:
    facts = {key: lora.get(key) for key in ("rank", "alpha", "target_modules")}
    shown = ", ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in facts.items() if value)
    return [f"LoRA: {shown}."] if shown else []


def _trained_on(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    domain, facts = _part(config, "domain"), _part(data, "domain")
    rows = f"{facts['train_rows']} rows of " if "train_rows" in facts else ""
    digest = f" (sha256 {_text(facts['train_sha256'])[:16]}…)" if "train_sha256" in facts else ""
    task = _text(domain.get("task"))
    return f"Tuned on {rows}{public_name(_text(domain.get('train')))}{digest}, read as `{task}`."


def _importance(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    used = _part(config, "importance").get("use")
    if used:
        return f"the importance {public_name(_text(used))}"
    facts = _part(_part(_part(results, "provenance"), "data"), "general")
    return f"importance recorded {_general(facts)}"


def _general(facts: Mapping[str, Any]) -> str:
    if "documents" not in facts:
        return "on data that it does not describe"
    digest = f", sha256 {_text(facts['sha256'])[:16]}…" if "sha256" in facts else ""
    source = {"files": "files", "hub": "a hub data set", "model": "samples of the base model"}
    kind = source.get(_text(facts.get("source")), _text(facts.get("source")))
    documents = f"{facts['documents']:,} document{'' if facts['documents'] == 1 else 's'}"
    return f"on {documents} from {kind} ({facts.get('characters', 0):,} characters{digest})"


def _measured(results: Mapping[str, Any]) -> list[str]:
    arms = _part(results, "arms")
    if "base" not in arms or len(arms) < 2:
        return ["Not measured yet; `hlora evaluate` measures it."]
    found = verdict(results)
    rows = [(row.measure, row.base, row.after, row.change) for row in summary_rows(results)]
    return [
        found.headline,
        _table(("measure", "base model", "tuned", "change"), rows),
        "Perplexity and forgetting are of general text: lower is better. "
        f"Evaluated on {_rows_of_test(results)} that were not trained on.",
    ]


def _of_general_phase(results: Mapping[str, Any]) -> list[str]:
    arms = {name: _part(results, "arms").get(name) for name in ("base", "after_general")}
    if not all(arms.values()):
        return ["Nothing. `hlora run` measures the general adapter too."]
    texts: dict[str, Any] = {"arms": {name: {"texts": arm["texts"]} for name, arm in arms.items() if arm}}
    rows = [(row.measure, row.base, row.after, row.change) for row in summary_rows(texts)]
    return [_table(("measure", "base model", "general adapter", "change"), rows)]


def _rows_of_test(results: Mapping[str, Any]) -> str:
    rows = _part(_part(_part(results, "provenance"), "data"), "domain").get("test_rows")
    return f"{rows} domain rows" if rows else "domain rows"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(map(_cell, head)), ["---"] + ["---:"] * (len(list(head)) - 1), *(list(map(_cell, r)) for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
