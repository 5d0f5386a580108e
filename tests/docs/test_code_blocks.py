"""Every code block of the documentation is run here, on a tiny model; a YAML is read as a part of a configuration.

The blocks of a page run in order and in one namespace, as a reader copies them into one script. What a page takes for
granted (a model, a trainer, an artefact on disk) stands in `Reader`. A block that cannot run here has its reason below,
or the test that runs it.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from conftest import GENERAL_TEXT, record
from datasets import Dataset
from pages import PAGES, REPOSITORY, Block, blocks, source
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from hlora import cli
from hlora.config.comparison import CompareConfig
from hlora.config.reading import load_chains, load_comparison, load_config, parse_config, read_yaml
from hlora.config.sections import DomainConfig
from hlora.config.starting import starting_yaml
from hlora.data.domain import domain_rows
from hlora.model.four_bits import keep_trainable

BLOCKS = [block for page in PAGES for block in blocks(page) if block.language not in ("text", "math")]
GUIDES = "tests/test_guides.py::test_the_"

# What stands in a block, by page: why the block is not run here. A test fails where one fits no block, or two.
NOT_RUN = {
    "README.md": {
        "make demo    #": "sets up a virtual environment: 3 GB; the make targets are checked",
        "pip install '.[run]'": "installs a package; its commands are in docs/quickstart.md, tests/test_chain.py and "
        "tests/after/test_chat.py",
    },
    "docs/guides/after-training.md": {
        "hlora chat": "tests/after/test_chat.py",
        "hlora merge": "tests/after/test_merge.py",
        "hlora push": "tests/after/test_push.py",
        "vllm serve": "needs vLLM, which needs a GPU; the page says that it was not run",
        "convert_hf_to_gguf.py": "needs a clone of llama.cpp and its programs; the page says that it was not run",
        "ollama create": "needs Ollama; the page says that it was not run",
        "hlora run other.yaml": "tests/test_once.py",
    },
    "docs/guides/domains.md": {"hlora run b.yaml --after": "tests/test_chain.py"},
    "docs/guides/quantised.md": {"hlora merge": "tests/after/test_merge.py"},
    "docs/guides/distributed.md": {
        "-m hlora run run.yaml\naccelerate launch --multi_gpu --num_machines=1": "tests/parallel/test_distributed.py",
        "accelerate launch --use_fsdp": "needs GPUs, or a modified Accelerate: tests/parallel",
        "--rdzv-endpoint=FIRST_MACHINE": "needs several machines; the same as two nodes of one machine: "
        "tests/parallel/test_distributed.py::test_accelerates_launcher_on_two_nodes_records_what_one_process_does",
        "#SBATCH": "needs Slurm",
        "train.py ddp DIRECTORY": f"{GUIDES}script_of_the_guide_records_and_tunes_under_ddp_and_fsdp2",
        "dist.init_process_group()": f"{GUIDES}script_of_the_guide_records_and_tunes_under_ddp_and_fsdp2",
        "def largest_share": f"{GUIDES}sizes_of_the_guide_are_what_its_command_prints",
    },
    "docs/guides/frameworks.md": {
        "record: runs": "a section of Axolotl's: tests/integrations/test_axolotl.py",
        "importance: runs": "a section of Axolotl's: tests/integrations/test_axolotl.py",
        "hlora.integrations.llama_factory": "tests/integrations/test_llama_factory.py",
        "from hlora.integrations.ms_swift": "tests/integrations/test_ms_swift.py",
        "swift sft": "tests/integrations/test_ms_swift.py",
    },
    "docs/guides/metamathqa.md": {
        "articles.skip(100)": f"{GUIDES}metamathqa_data_of_the_guide_are_what_its_configuration_reads",
        "+import hlora": f"{GUIDES}metamathqa_patch_starts_at_the_general_adapter_and_adds_a_penalty_with_gradients",
        "git clone": "needs GitHub",
        "python run.py -v": "needs PEFT's clone and a GPU",
    },
    "docs/guides/ray.md": {
        "--engine ray --cpus-per-cell 1": "tests/comparison/test_ray_engine.py",
        "ray start": "needs a cluster; the same as two nodes of one machine: tests/comparison/test_ray_engine.py",
    },
    "docs/guides/trainers.md": {
        "trainer = DPOTrainer": "tests/importance/test_preference.py::test_dpo_is_a_plain_loop_with_the_reference_that_"
        "the_guide_says",
    },
    "docs/results/tried.md": {"tests/matrix/tables.py": "takes 20 minutes; tests/matrix/test_matrix.py"},
    "docs/guides/trackers.md": {"tensorboard --logdir": "serves until it is stopped; tests/training/test_trackers.py"},
}


def why_not_run(block: Block) -> str | None:
    reasons = [reason for words, reason in NOT_RUN.get(block.page, {}).items() if words in block.text]
    assert len(reasons) <= 1, f"{block}: two reasons"
    return reasons[0] if reasons else None


RUN = [block for block in BLOCKS if why_not_run(block) is None]


def in_language(language: str) -> list[Block]:
    return [block for block in RUN if block.language == language]


def test_every_block_is_run_or_has_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = [str(block) for block in BLOCKS if block.language not in ("python", "yaml", "bash", "json", "diff")]
    assert not unknown, "say which language it is: python, yaml, bash, json; text for what is no code"
    for page, reasons in NOT_RUN.items():
        for words, reason in reasons.items():
            assert sum(words in block.text for block in blocks(page)) == 1, f"{page}: {words!r} fits no block, or two"
            for file, test in re.findall(r"(tests/[\w/.]+\.py)(?:::(\w+))?", reason):
                assert (REPOSITORY / file).is_file() and test in (REPOSITORY / file).read_text(encoding="utf-8")
    elsewhere = sum("tests/" in str(why_not_run(block)) for block in BLOCKS)
    with capsys.disabled():
        print(
            f"\ncode blocks: {len(RUN)} of {len(BLOCKS)} run here, {elsewhere} by other tests, "
            f"{len(BLOCKS) - len(RUN) - elsewhere} need what is not here"
        )


class Reader:
    """What somebody has who follows the documentation: a directory with data, a model and an importance of it."""

    def __init__(self, model_dir: str, adapted: LoraConfig, base_options: dict[str, Any]) -> None:
        self.model_dir = model_dir
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_dir, **base_options)
        keep_trainable(base)
        model = get_peft_model(base, adapted)
        ids = torch.randint(3, 384, (16, 12))
        for run in ("general", "mine"):
            record(model, ids, "factored").save(f"runs/{run}/importance")
            model.save_pretrained(f"runs/{run}/adapter")
        Path("data").mkdir()
        for name in ("general.txt", "data/probe.txt", "data/encyclopedia.txt"):
            Path(name).write_text(GENERAL_TEXT, encoding="utf-8")
        for name, first in (("train", 0), ("test", 100)):
            rows = [f'{{"prompt": "What is {n} + 1?", "completion": " {n + 1}"}}\n' for n in range(first, first + 24)]
            Path(f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        Path("my.yaml").write_text(starting_yaml(), encoding="utf-8")
        batch = {"input_ids": ids[:4], "labels": ids[:4]}
        self.model, self.batches = model, [batch, batch]

    def names(self) -> dict[str, Any]:
        """What the pages' blocks take for granted."""
        rows = Dataset.from_list([{"prompt": f"What is {n} + 1?", "completion": f" {n + 1}"} for n in range(8)])
        args = SFTConfig(
            output_dir="logs", max_steps=2, per_device_train_batch_size=2, max_length=32, report_to=[],
            save_strategy="no", use_cpu=True, bf16=False,
        )  # fmt: skip
        names = {
            "AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel, "SFTTrainer": SFTTrainer,
            "args": args, "base_name": self.model_dir, "model": self.model, "peft_model": self.model,
            "general_text": Dataset.from_dict({"text": GENERAL_TEXT.split("\n\n")}), "medical": rows,
            "general": self.batches, "domain": self.batches,
            "optimizer": torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3),
            "tokenizer": AutoTokenizer.from_pretrained(self.model_dir), "text": GENERAL_TEXT,
        }  # fmt: skip
        exec("import hlora", names)
        names["trainer"] = SFTTrainer(model=self.model, train_dataset=rows, args=args)
        return names


ADAPTED: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
IN_FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize("page", sorted({block.page for block in in_language("python")}))
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantised = page == "docs/guides/quantised.md"
    adapted = LoraConfig(
        **{**ADAPTED, **({"r": 8, "lora_alpha": 32, "target_modules": "all-linear"} if quantised else {})}
    )
    reader = Reader(model_dir, adapted, {"quantization_config": IN_FOUR_BITS} if quantised else {})
    names = reader.names()
    for block in in_language("python"):
        if block.page == page:
            text = re.sub(r'"(meta-llama|HuggingFaceTB)/[\w.-]+"', repr(model_dir), block.text)
            exec(compile("\n" * block.line + text, str(REPOSITORY / page), "exec"), names)


@pytest.mark.parametrize("block", in_language("yaml"), ids=str)
def test_a_yaml_is_a_part_of_a_configuration(block: Block) -> None:
    part, run = yaml.safe_load(block.text), yaml.safe_load(starting_yaml())
    if set(part) <= set(run):
        if "domains" in part:
            del run["domain"]
        given = {name: {**run[name], **each} if isinstance(each, dict) else each for name, each in part.items()}
        parse_config({**run, **given}, str(block))
    else:
        grid = read_yaml(REPOSITORY / "configs" / "compare-smollm2.yaml")
        grid.pop("ablation", None)  # it names arms, which the block has others of
        parse_config({**grid, **part}, str(block), kind=CompareConfig)


@pytest.mark.parametrize("block", in_language("json"), ids=str)
def test_a_row_is_one_that_hlora_takes(block: Block, tmp_path: Path) -> None:
    """Rows of `domain.task: rows`, one a line."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"prompt": "What is 1 + 1?", "completion": " 2"}', encoding="utf-8")
    test.write_text(block.text, encoding="utf-8")
    rows = domain_rows(DomainConfig(task="rows", train=str(train), test=str(test)), None, seed=0)
    assert len(rows.test) == len(block.text.splitlines())


# A run of seconds: few steps, few tokens, few answers.
SHORT = [
    f"--set={setting}"
    for setting in (
        "training.record.max_steps=2", "training.record.max_length=32", "training.record.per_device_train_batch_size=2",
        "training.tune.max_steps=2", "training.tune.max_length=64", "training.tune.per_device_train_batch_size=2",
        "evaluation.max_tokens=64", "evaluation.window=32", "evaluation.stride=32", "evaluation.max_rows=2",
        "evaluation.generate=1", "evaluation.max_new_tokens=2",
    )
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("block", in_language("bash"), ids=str)
def test_the_commands_of_a_block_run(
    block: Block, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "smollm2-135m").symlink_to(model_dir)  # what the printed configuration names
    Reader(model_dir, LoraConfig(**ADAPTED), {})
    if "hlora run my.yaml" in block.text:
        shutil.rmtree("runs/mine")  # the block makes it
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip():
            run_line(line, str(block))


def run_line(line: str, where: str) -> None:
    words = shlex.split(line, comments=True)
    program, *arguments = words
    if program == "make":
        assert all(f"\n{target}:" in source("Makefile") for target in arguments), f"{where}: {line}: no such target"
    elif program == "pip":
        assert "install" in arguments  # tests/test_packaging.py has the extras
    elif program == "python":
        script, *options = arguments
        flags = [option for option in options if option.startswith("--")]
        assert all(f'"{flag}"' in source(script) for flag in flags), f"{where}: {line}: no such option"
    else:
        assert program == "hlora", f"{where}: {line}: say here how it is run, or in NOT_RUN why not"
        run_hlora(arguments)


def run_hlora(arguments: list[str]) -> None:
    """The command in this process; one on a configuration of configs/, which takes hours, is read and checked only."""
    target = None
    if ">" in arguments:
        *arguments, _, target = arguments
    ours = [argument for argument in arguments if argument.startswith("configs/") or "compare-smollm2" in argument]
    if ours:
        check_hlora([str(REPOSITORY / each) if each.startswith("configs/") else each for each in arguments])
        return
    short = SHORT if arguments[0] in ("check", "run", "record", "tune", "evaluate") else []
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.app([*arguments, *short], standalone_mode=False)
    assert said.getvalue()
    if target:
        Path(target).write_text(said.getvalue(), encoding="utf-8")


def check_hlora(arguments: list[str]) -> None:
    """The command line is one that hlora takes, and its configuration with the overrides is valid."""
    group: Any = typer.main.get_command(cli.app)
    name, *rest = arguments
    parsed = group.commands[name].make_context(name, rest).params
    if config := parsed.get("config"):
        read: Callable[..., Any] = load_config
        if name == "compare":
            read = load_chains if "domains" in read_yaml(config) else load_comparison
        read(config, parsed["overrides"])
