"""Record once, and overwrite nothing: which importance a run uses, and whether its output is finished already."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hlora.config.reading import parse_config, read_yaml
from hlora.config.run import RunConfig
from hlora.importance.artefact import Importance
from hlora.parallel.group import on_main
from hlora.run.inputs import CONTINUED, changed_since, has_record
from hlora.run.job import Job
from hlora.run.resume import OF_MEASURES, UNFINISHED, by_rows_of_a_step, seen
from hlora.system.errors import ArtifactError, ConfigError
from hlora.system.redaction import redacted

logger = logging.getLogger("hlora")

_SHOWN = 6  # settings that a message names


def given_importance(config: RunConfig) -> Importance | None:
    """The importance that was recorded before: the one that `importance.use` names, or of the run it comes `after`.

    Raises:
        ArtifactError: there is none, or it is of another method or encoding than the configuration asks for.
    """
    if not config.is_given_importance:
        return None
    try:
        importance = Importance.load(importance_source(config))
    except ArtifactError as error:
        raise ArtifactError(f"{'after' if config.after else 'importance.use'}: {error}") from None
    if config.after is not None:
        asked = {name: getattr(config.importance, name) for name in ("method", "encoding")}
        kept = {"method": importance.method, "encoding": importance.encoding}
        for name in sorted(config.importance.model_fields_set & {*asked}):
            if asked[name] != kept[name]:
                raise ArtifactError(
                    f"importance.{name}: {asked[name]}, but {config.after} recorded {kept[name]}, and the two cannot "
                    "be added. Leave the field out, or start anew without after."
                )
    logger.info("importance: using %s; nothing is recorded on general text", importance_source(config))
    return importance


def importance_source(config: RunConfig) -> str | Path:
    """Where the importance for the domain phase is, or will be."""
    if config.after is None:
        return config.importance.use or Path(config.output) / "importance"
    source = Path(config.after) / CONTINUED
    if not source.is_dir():
        raise ArtifactError(
            f"after: {config.after} has no {CONTINUED}, the importance of what was learned so far. Name the output of "
            "a finished `hlora run` with penalty.anchor general, or run it again with this version (--overwrite)."
        )
    return source


def recording_settings(config: RunConfig) -> dict[str, Any]:
    """What determines an importance besides the base model and the text, as its provenance keeps it."""
    settings: dict[str, Any] = {
        "seed": config.seed,
        "model": {"quantization": config.model.quantization, "dtype": config.model.dtype},
        "lora": config.lora.model_dump(),
        "importance": config.importance.model_dump(exclude={"use"}),
    }
    if config.importance.method == "squared_gradients":
        del settings["importance"]["xi"]  # of a path integral: it has no effect
    if not config.in_one_pass:
        # another number of processes may resume
        settings["training"] = seen(by_rows_of_a_step(config.training.record_arguments()))
    found: dict[str, Any] = redacted(settings)
    return found


def importance_here(job: Job, overwrite: bool) -> Importance | None:
    """The importance in the output directory, where it is the one that this run would record.

    One that does not say how it was recorded, as of a script, counts if it is of the same method and encoding.

    Raises ConfigError that names the settings which differ, unless `overwrite`.
    """
    directory = job.output / "importance"
    if not (directory / "importance.json").is_file():
        return None
    try:
        found = Importance.load(directory)
    except ArtifactError as error:
        logger.warning("%s; recording again", error)
        return None
    differ = _other_recording(found, job)
    if not differ:
        logger.info("importance: %s was recorded with these settings before; nothing is recorded", directory)
        return found
    if overwrite:
        return None
    raise ConfigError(
        f"importance: {directory} was recorded with other settings: {_named(differ)}. Use it (--importance {directory} "
        "and another output), record again in its place (--overwrite), or name another output."
    )


def _other_recording(found: Importance, job: Job) -> list[str]:
    mine, kept = recording_settings(job.config), found.provenance.get("recorded_with")
    if kept is None:
        kept = {**mine, "importance": dict(mine["importance"])}
        kept["importance"] |= {"method": found.method, "encoding": found.encoding}
    differ = differences(kept, mine)
    texts = [facts.get("sha256") for facts in (found.provenance.get("data") or {}, job.general.facts)]
    return differ + (["general (another text)"] if None not in texts and texts[0] != texts[1] else [])


def is_finished(config: RunConfig, made: str, overwrite: bool) -> bool:
    """Whether `made`, such as results.json, is in the output directory already, by the same settings.

    Raises ConfigError that names the settings which differ or whose files changed since, or a part that is gone, unless
    `overwrite`.
    """
    output = Path(config.output)
    kept = output / "config.yaml"
    if overwrite or not (output / made).exists() or not kept.is_file() or (output / UNFINISHED).exists():
        return False
    differ = _other_settings(_settings_of(kept), config)
    differ += [f"{field} (changed since)" for field in changed_since(output, config)]
    if differ:
        measures = {f"evaluation.{name}" for name in OF_MEASURES}
        measured = made == "results.json" and measures.issuperset(each.split(" ")[0] for each in differ)
        raise ConfigError(
            f"output: {output} holds a finished run ({made}) with other settings: {_named(differ)}. "
            f"{'Measure it by these with `hlora evaluate`, name' if measured else 'Name'} another output, or replace "
            "it: --overwrite."
        )
    parts = ["adapter"] if config.is_given_importance else ["adapter", "importance"]
    gone = [part for part in parts if made == "results.json" and not (output / part).is_dir()]
    if gone:
        raise ConfigError(
            f"output: {output} holds a finished run ({made}) without its {' and '.join(gone)}. Bring back what is "
            f"missing, or run again in its place: --overwrite. `hlora report {output}` shows the results without it."
        )
    return True


def already_done(config: RunConfig, made: str, overwrite: bool) -> bool:
    """Whether `is_finished`, which is then said. In several processes every one calls it."""
    finished = on_main(lambda: is_finished(config, made, overwrite))
    if finished:
        logger.info(
            "output: %s is finished, with these settings; nothing to do (--overwrite: do it again)", config.output
        )
    return finished


def with_other_arms(results: dict[str, Any], earlier: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """New results with the arms of earlier ones that were not measured again: baselines, whose models are not kept.

    Arms of other settings or data are left out, with a warning.
    """
    others = [arm for arm in earlier["arms"] if arm not in results["arms"]]
    differ = _other_settings(earlier.get("config") or {}, config)
    facts = [(each.get("provenance") or {}).get("data") for each in (earlier, results)]
    one, other = (json.dumps(redacted(each), sort_keys=True) for each in facts)
    differ += ["the data"] if one != other else []
    if others and differ:
        logger.warning("left out: %s, which was measured with other settings: %s", ", ".join(others), _named(differ))
        return results
    return {**results, "arms": {**earlier["arms"], **results["arms"]}}


def _other_settings(earlier: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Settings that differ, without those that the user did not set."""
    found = differences(earlier, redacted(config.for_a_file()))
    return [each for each in found if not _is_ours(each.split(" ")[0], config)]


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields by path whose values differ, each with both."""
    one, other = dict(_flat(earlier)), dict(_flat(now))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name} (there {_short(one.get(name))}, here {_short(other.get(name))})" for name in names]


def _is_ours(field: str, config: RunConfig) -> bool:
    """Whether the user did not set a field: the place, and a default length that was cut to the model's context.

    Nor does it matter where a local model lies: `changed_since` compares what is in it.
    """
    if field == "model.name":
        return Path(config.model.name).is_dir() and has_record(Path(config.output), field)
    section, _, name = field.rpartition(".")
    if field == "training.common.max_length":
        return name not in config.training.common
    fitted = ("evaluation.window", "importance.sequence_length", "general.sample_tokens")
    return field == "output" or (field in fitted and name not in getattr(config, section).model_fields_set)


def _settings_of(kept: Path) -> dict[str, Any]:
    fields = read_yaml(kept)
    try:
        found: dict[str, Any] = redacted(parse_config(fields, str(kept)).for_a_file())
        return found
    except ConfigError:  # of another version of hlora
        return fields


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        elif value not in (None, {}, []):  # as good as not there
            yield f"{path}{name}", value


def _short(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)


def _named(differ: list[str]) -> str:
    rest = len(differ) - _SHOWN
    return ", ".join(differ[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
