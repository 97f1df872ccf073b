"""report: reports/, manifests of data/ -> reports/index.html."""

from pathlib import Path

from stages.page.facts import read_facts
from stages.page.render import render_page
from stages.runner import console_progress, run_stage
from tinyllm import paths
from tinyllm.artifact import write_text


def report() -> None:
    """Write one offline page about everything that has run so far."""
    facts = read_facts(paths.REPORTS, Path())
    write_text(paths.REPORT_PAGE, render_page(facts))
    console_progress().say(f"{paths.REPORT_PAGE}: open it in a browser")


if __name__ == "__main__":
    run_stage(report)
