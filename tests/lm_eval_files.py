"""Tasks of lm-evaluation-harness on local files, and a process without a network."""

import json
import os
import pathlib
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).parents[1]
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Norway": "Oslo", "Spain": "Madrid", "Greece": "Athens",
}  # fmt: skip


def write_lines(path: pathlib.Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tasks(folder: pathlib.Path, **changes) -> list[str]:
    """Tasks of each kind of request about eight capitals; `changes` of the written one. Their names."""
    rows = []
    for i, (country, capital) in enumerate(CAPITALS.items()):
        others = 2 * [name for name in CAPITALS.values() if name != capital]
        choices = [*others[i : i + i % 4], capital, *others[i + i % 4 : i + 3]]
        rows.append({"country": country, "capital": capital, "choices": choices, "answer": i % 4})
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": write_lines(folder / "capitals.jsonl", rows)}},
        "test_split": "test",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "capitals": {
            "output_type": "multiple_choice",
            "doc_to_text": "The capital of {{country}} is",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "capitals_written": {
            "output_type": "generate_until",
            "doc_to_text": "The capital of {{country}} is",
            "doc_to_target": " {{capital}}",
            "generation_kwargs": {"until": [".", ","], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
            **changes,
        },
        "capitals_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{capital}} is the capital of {{country}}, and its people are proud of it.",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return list(tasks)


def run(*command, folder: pathlib.Path, **env) -> subprocess.CompletedProcess:
    """A Python process in `folder` that reaches no network and keeps its caches there."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, **settings, "HF_HUB_OFFLINE": "1", **env},
    )  # fmt: skip
