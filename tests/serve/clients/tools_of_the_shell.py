"""Programs as clients of `qsun serve`: python tools_of_the_shell.py NAME. The last line printed says what was done."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

URL, MODULE, WORK = os.environ["QSUN_URL"], os.environ["QSUN_MODULE"], Path(os.environ["QSUN_WORK"])


def call(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    print(done.stdout[-4000:], done.stderr[-4000:])
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        sys.exit(f"exit code {done.returncode}: {' '.join(lines[-3:])}")
    return done.stdout


def llm() -> str:
    home = WORK / "llm"
    home.mkdir(exist_ok=True)
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: qsun\n  model_name: base\n  api_base: {URL}/v1\n  supports_schema: true\n  supports_tools: true\n"
    )
    settings = {"LLM_USER_PATH": str(home), "OPENAI_API_KEY": "any-key-will-do"}
    call("llm", "-m", "qsun", "-o", "max_tokens", 8, "calc 1+1", **settings)
    call("llm", "-m", "qsun", "--no-stream", "-o", "max_tokens", 8, "calc 1+1", **settings)
    schema = {"type": "object", "properties": {"name": {"enum": ["apple", "pear"]}}, "required": ["name"]}
    answer = call("llm", "-m", "qsun", "--schema", json.dumps(schema), "--no-stream", "calc 1+1", **settings)
    assert json.loads(answer)["name"] in ("apple", "pear")
    return "stream, whole, schema"


TASK = """\
task: two_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def lm_eval() -> str:
    """A log-likelihood task, against `qsun lm-eval` on the same module."""
    tasks = WORK / "tasks"
    tasks.mkdir(exist_ok=True)
    rows = [
        {"question": f"calc {a}+{b}>", "choices": [str(a + b), str(a + b + 7)], "target": (a + b) % 2}
        for a, b in ((12, 8), (3, 4), (20, 31), (7, 7), (9, 2), (15, 6))
    ]
    data = tasks / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "two_answers.yaml").write_text(TASK.format(file=data))
    common = ["run", "--tasks", "two_answers", "--include_path", tasks, "--log_samples"]
    served = f"model=base,base_url={URL}/v1/completions,tokenizer={MODULE},tokenizer_backend=huggingface"
    served += ",num_concurrent=1,max_retries=1,add_bos_token=True"
    arguments = [*common, "--model", "local-completions", "--model_args", served, "--output_path", WORK / "served"]
    call(sys.executable, "-m", "lm_eval", *arguments)
    own = ["--model", "qsun", "--model_args", f"decode={MODULE},dtype=float32", "--output_path", WORK / "own"]
    call(os.environ["QSUN_PYTHON"], "-m", "qsun.cli.main", "lm-eval", *common, *own)
    ours, theirs = samples(WORK / "own"), samples(WORK / "served")
    assert len(ours) == len(theirs) == 2 * len(rows)
    furthest = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    assert furthest < 1e-3, f"log-likelihoods differ by {furthest}: {ours} {theirs}"
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    return f"12 log-likelihoods as `qsun lm-eval` gives them, within {furthest:.1e}"


def samples(directory: Path) -> list[tuple[float, bool]]:
    """(log-likelihood, greedy) of every choice, in the order of the rows."""
    (file,) = directory.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [(float(value), str(greedy) == "True") for row in rows for (value, greedy) in flat(row["filtered_resps"])]


def flat(responses: list) -> list:
    return [response if len(response) == 2 else response[0] for response in responses]


def cached_tokenizer() -> str:
    """Put the module's tokenizer where the Hub's cache would be: aiperf takes no directory. Returns its name."""
    cache, commit = WORK / "hub" / "models--qsun--demo", "1" * 40
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    for file in Path(MODULE).glob("*.json*"):
        shutil.copyfile(file, snapshot / file.name)
    return "qsun/demo"


def aiperf() -> str:
    tokenizer = cached_tokenizer()
    for kind in ("chat", "completions"):
        call(
            "aiperf", "profile", "--model", "base", "--url", URL, "--endpoint-type", kind, "--streaming", "--tokenizer",
            tokenizer, "--extra-inputs", "ignore_eos:true", "--request-count", 4,
            "--concurrency", 2, "--synthetic-input-tokens-mean", 32,
            "--output-tokens-mean", 8, "--ui-type", "none", "--output-artifact-dir", WORK / f"aiperf-{kind}",
            HF_HUB_CACHE=str(WORK / "hub"),
        )  # fmt: skip
        (report,) = (WORK / f"aiperf-{kind}").rglob("profile_export_aiperf.json")
        assert json.loads(report.read_text())["request_count"]["avg"] == 4
    return "4 chats and 4 completions, streamed"


def guidellm() -> str:
    report = WORK / "guidellm.json"
    call(
        "guidellm", "run", "--backend", f"kind=openai_http,target={URL},model=base", "--profile", "kind=synchronous",
        "--constraint", "kind=max_requests,count=4", "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "--tokenizer", f"kind=hf_auto,model={MODULE}", "--output", f"kind=json,path={report}", "--disable-console",
    )  # fmt: skip
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0), totals
    return "4 requests"


if __name__ == "__main__":
    try:
        print(globals()[sys.argv[1].replace("-", "_")]())
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
