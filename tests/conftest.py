"""A tiny random Llama with a byte-level tokenizer, and ω as the equations say it, for the core's tests."""

from __future__ import annotations

import copy
import gc
import json
import os
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
import yaml
from made_comparison import SMALL, make_comparison
from peft import LoraConfig, PeftModel, get_peft_model
from tally import pytest_terminal_summary, tally  # noqa: F401  # of tests/faults
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hlora.importance.artefact import Importance
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import adapted_matrices
from hlora.numerics import equations

if TYPE_CHECKING:
    from hlora.config.comparison import CompareConfig
    from hlora.run.job import Job

GENERAL_TEXT = "\n\n".join(pydoc_data.topics.topics[name] for name in ("assert", "booleans", "break", "calls", "class"))
REPOSITORY = Path(__file__).resolve().parents[1]
DATA_SETS = ("wikitext2", "piqa", "medmcqa", "qasc", "shakespeare")


FRAMEWORKS = {"axolotl": "axolotl", "llama_factory": "llamafactory", "ms_swift": "swift"}
"""Each pins other versions than hlora's tests, so each has an environment of its own: see CONTRIBUTING.md."""
collect_ignore = [f"integrations/test_{name}.py" for name, package in FRAMEWORKS.items() if find_spec(package) is None]


TOGETHER = (
    "comparison/test_ray_engine.py",  # clusters of Ray on one machine find each other
    "docs/test_site.py",
    "faults/test_accessibility.py",
    "faults/test_commands.py",
    "parallel/test_distributed.py",
    "tests/test_examples.py",
)
"""Files whose tests stay in one of the processes of `pytest -n`: their fixtures take 5 to 90 s, once a process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The files of TOGETHER first, then test by test. xdist 3.8's groups have no effect under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/faults are slow: killed runs, failing disks, hundreds of malformed inputs, a browser."""
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep what was imported from the collector, which Accelerate calls in each phase: 2.7 s of CPU a run, not 3.9."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With HLORA_NO_SKIPS, as CI has it, a test that is skipped for anything but a GPU has failed."""
    report: Any = yield
    if report.skipped and "HLORA_NO_SKIPS" in os.environ and "GPU" not in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"skipped where nothing but a GPU may be missing: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a 2-layer random Llama (hidden 32, 4 heads, 2 KV heads, vocabulary 384)."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([GENERAL_TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


Invoke = Any  # callable(*arguments) -> (status, stdout, stderr)


@pytest.fixture
def hlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in this process: (*arguments) → status, stdout, stderr."""

    from hlora.cli import main  # as all of hlora[run] here, imported where it is used: the core's tests go without

    def invoke(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hlora", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return invoke


@pytest.fixture
def peft_model(model_dir: str):
    """The tiny Llama with LoRA (r 4, alpha 8) on q_proj and v_proj; B is zero."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(model_dir)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


@pytest.fixture
def token_ids() -> torch.Tensor:
    """16 rows of 12 token ids."""
    return torch.randint(3, 384, (16, 12), generator=torch.Generator().manual_seed(2))


def move_adapter(
    model: Any, seed: int = 0, deviation: float = 0.1, unprotected: Literal["refuse", "warn"] = "refuse"
) -> None:
    """Give every LoRA factor random values, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in adapted_matrices(model, unprotected=unprotected):
            for factor in (matrix.A, matrix.B):
                factor.copy_(deviation * torch.randn(factor.shape, generator=generator))


class ReferenceOmega:
    """ω of every matrix, dense in float64, by the equations: `before` and `after` each optimizer step."""

    def __init__(self, model: Any) -> None:
        self.matrices = adapted_matrices(model)
        self.omega = {m.name: torch.zeros(m.B.shape[0], m.A.shape[1], dtype=torch.float64) for m in self.matrices}
        self.gradients: dict[str, list[torch.Tensor]] = {m.name: [] for m in self.matrices}

    def before(self, lr: float, gradient_scale: float = 1.0) -> None:
        self.kept = {}
        for m in self.matrices:
            A, B, grad_A, grad_B = (t.detach().double() for t in (m.A, m.B, m.A.grad, m.B.grad))
            gradient = equations.effective_gradient(
                A, B, gradient_scale * grad_A, gradient_scale * grad_B, lr=lr, scale=m.scale
            )
            self.gradients[m.name].append(gradient)
            self.kept[m.name] = (A.clone(), B.clone(), gradient)

    def after(self) -> None:
        for m in self.matrices:
            A, B, gradient = self.kept[m.name]
            delta = equations.movement(A, B, m.A.detach().double(), m.B.detach().double(), scale=m.scale)
            self.omega[m.name] = equations.path_integral(self.omega[m.name], gradient, delta)

    def assert_matches(self, omega: dict[str, Any], tolerance: float = 1e-4) -> None:
        """Within `tolerance` of the largest element; factored ones by their row and column sums."""
        assert list(omega) == list(self.omega)
        for name, expected in self.omega.items():
            got = omega[name]
            pairs = (
                [(got, expected)]
                if isinstance(got, torch.Tensor)
                else zip(got, (expected.sum(1), expected.sum(0)), strict=True)
            )
            for mine, other in pairs:
                assert other.abs().max() > 0
                bound = tolerance * float(other.abs().max())
                torch.testing.assert_close(mine.double(), other, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def general_file(tmp_path: Path) -> str:
    path = tmp_path / "general.txt"
    path.write_text(GENERAL_TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> tuple[str, str]:
    """A train and a test file of multiple-choice rows (question, choices, label)."""
    paths = []
    for name, start, count in (("train", 0, 24), ("test", 100, 8)):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"question": f"What is {n} plus one?", "choices": [str(n + 1), str(n + 2), str(n)], "label": 0}
            for n in range(start, start + count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.fixture
def shared_data() -> Path:
    """The data that configs/ read, in data/ or, in CI, beside the clone. Tests that need it skip where it is absent."""
    for found in (REPOSITORY / "data", REPOSITORY.parent / "shared" / "data"):
        if all((found / name).is_dir() for name in DATA_SETS):
            return found
    pytest.skip(f"needs the data sets in {REPOSITORY / 'data'}, which are not there; `make data` brings them")


def record(
    model: PeftModel,
    rows: Tensor,
    encoding: str = "float32",
    steps: int = 3,
    xi: float = 1e-3,
    unprotected: Literal["refuse", "warn"] = "refuse",
    **options: Any,
) -> Importance:
    """Importance after some AdamW steps on `rows`, four a step."""
    torch.manual_seed(0)
    recorder = ImportanceRecorder(model, encoding, unprotected=unprotected, method="path_integral")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    recorder.attach(optimizer)
    for step in range(steps):
        part = rows[4 * (step % 4) :][:4]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return recorder.consolidate(xi, **options)


@pytest.fixture
def job_fields(tmp_path: Path, model_dir: str, general_file: str, questions: tuple[str, str]) -> dict[str, Any]:
    """Settings of the smallest job, the tiny Llama on made-up questions, for a test to change and parse."""
    return {
        "output": str(tmp_path / "out"),
        "model": {"name": model_dir, "device": "cpu"},
        "lora": {"rank": 4, "alpha": 8},
        "general": {"paths": [general_file]},
        "domain": {"task": "multiple_choice", "train": questions[0], "test": questions[1]},
        "training": {
            "common": {"learning_rate": 5e-3, "per_device_train_batch_size": 4},
            "record": {"max_steps": 4, "max_length": 32},
            "tune": {"max_steps": 4, "max_length": 64},
        },
    }


@pytest.fixture
def open_job(job_fields: dict[str, Any]) -> Callable[..., Job]:
    """Opens a comparison's cell of three steps on the tiny Llama, with changes as `section__field=value`."""
    from hlora.config.comparison import CellConfig
    from hlora.config.reading import parse_config
    from hlora.run.job import Job

    def build(resumable: bool = False, **changes: Any) -> Job:
        fields = {**copy.deepcopy(job_fields), "method": "lora", "fisher": {"examples": 6, "max_length": 16}}
        fields["training"]["common"]["report_to"] = []
        fields["training"]["tune"]["max_steps"] = 3
        for path, value in changes.items():
            section, name = path.rsplit("__", 1)
            part = fields
            for key in section.split("__"):
                part = part[key]
            part[name] = value
        return Job.open(parse_config(fields, kind=CellConfig), resumable)

    return build


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> Path:
    """Output directory of a finished run on the tiny Llama, to read only."""
    directory = tmp_path_factory.mktemp("tuned")
    (directory / "general.txt").write_text(GENERAL_TEXT, encoding="utf-8")
    for name, start, count in (("train", 0, 24), ("test", 100, 8)):
        rows = [{"prompt": f"What is {n} plus one?", "completion": f" {n + 1}"} for n in range(start, start + count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {
        "output": str(directory / "run"),
        "model": {"name": model_dir, "device": "cpu"},
        "lora": {"rank": 4, "alpha": 8},
        "general": {"paths": [str(directory / "general.txt")]},
        "domain": {"task": "rows", "train": str(directory / "train.jsonl"), "test": str(directory / "test.jsonl")},
        "training": {
            "common": {"learning_rate": 5e-2, "per_device_train_batch_size": 4, "report_to": []},
            "record": {"max_steps": 2, "max_length": 32},
            "tune": {"max_steps": 4, "max_length": 64},
        },
        "evaluation": {"max_tokens": 64, "window": 32, "stride": 32, "accuracy": False, "generate": 0},
    }
    from hlora import pipeline
    from hlora.config.reading import parse_config

    pipeline.run(parse_config(fields))
    return directory / "run"


@pytest.fixture
def comparison_file(tmp_path: Path, job_fields: dict[str, Any], general_file: str) -> Path:
    """A comparison of five arms on the tiny Llama, two seeds, a few seconds each."""
    text = Path(general_file).read_text(encoding="utf-8")
    general, other = tmp_path / "general.jsonl", tmp_path / "other.txt"
    general.write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")), encoding="utf-8")
    other.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20, encoding="utf-8")
    job_fields["training"]["common"]["learning_rate"] = 2e-2
    task = job_fields.pop("domain")
    fields = {
        **job_fields,
        "output": str(tmp_path / "grid"),
        "seeds": [0, 1],
        "general": {"paths": [str(general)]},
        "tasks": {"sums": task},
        "arms": {
            "Base": {"method": "base"},
            "LoRA(μ)": {"method": "lora"},
            "LoRA(ν+μ)": {"method": "lora_after_general"},
            "EWC-LoRA": {"method": "ewc", "strengths": [1, 100]},
            "HLoRA": {"method": "hlora", "strengths": [1, 1000]},
        },
        "fisher": {"examples": 4, "max_length": 16},
        "evaluation": {
            "texts": {"other": str(other)},
            "max_tokens": 200,
            "window": 64,
            "stride": 64,
            "generate": 0,
        },
        "selection": {"rows": 6},
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def comparison_config(comparison_file: Path) -> CompareConfig:
    from hlora.config.reading import load_comparison

    return load_comparison(comparison_file)


@pytest.fixture
def small_comparison() -> dict[str, Any]:
    """What comparison.json holds, made up: Base, LoRA(μ), EWC-LoRA and HLoRA on one task by three seeds."""
    return make_comparison(SMALL, ["piqa"])
