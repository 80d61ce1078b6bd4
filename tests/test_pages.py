"""The pages of docs/: every block of Python runs, and each error is raised by the block below."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "```python" in p.read_text())
TROUBLE = DOCS / "troubleshooting.md"
PROCESSES = DOCS / "distributed.md"  # test_distributed.py runs it
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(code: str, page: Path, names: dict) -> None:
    exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p not in (TROUBLE, PROCESSES)],
    ids=lambda p: str(p.relative_to(DOCS)),
)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for package in ("peft", "transformers", "bitsandbytes", "torchao"):
        if re.search(rf"^(import|from) {package}", text, re.MULTILINE):
            pytest.importorskip(package)
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    for code in BLOCK.findall(text):
        run(code, page, names)


def test_every_error_is_raised_as_it_is_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("peft")
    first, *sections = TROUBLE.read_text().split("\n## ")
    names: dict = {"__name__": "page"}
    run("".join(BLOCK.findall(first)), TROUBLE, names)
    raised = 0
    for section in sections:
        title, _, rest = section.partition("\n")
        blocks = BLOCK.findall(rest)
        if not blocks:
            assert title.startswith("No error")
            continue
        kind, _, message = title.partition(": ")
        pattern = ".*".join(map(re.escape, message.split("…")))
        (code,) = blocks
        with pytest.raises(Exception) as error:
            run(code, TROUBLE, names)
        assert type(error.value).__name__ == kind, title
        assert re.fullmatch(pattern, str(error.value), re.DOTALL), f"{title}\n{error.value}"
        raised += 1
    assert raised >= 10


def test_every_page_is_in_the_index_and_every_link_leads_somewhere():
    pages = sorted(DOCS.rglob("*.md"))
    index = (DOCS / "README.md").read_text()
    for page in pages:
        assert page.name == "README.md" or f"({page.relative_to(DOCS)})" in index, page
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_every_op_has_a_page():
    import fused_lora as fl

    ops = {n for n in fl.__all__ if n in vars(fl.reference) and callable(getattr(fl, n))}
    assert len(ops) >= 6
    text = "".join(p.read_text() for p in (DOCS / "ops").glob("*.md"))
    assert not [name for name in ops if f"`fl.{name}`" not in text]
