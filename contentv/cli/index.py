"""`contentv index`: a dataset's indexes put in order, and everything checked on request."""

from __future__ import annotations

from collections.abc import Sequence

from contentv.base.errors import UserError
from contentv.base.log import console
from contentv.config.schema import IndexConfig
from contentv.data.indexing import index_dataset


def run(config: IndexConfig, overrides: Sequence[str]) -> None:
    """Makes indexes, takes in tars, refits and checks as asked, and prints what was done.

    Raises:
        UserError: `path` names no dataset, or it has faults; each is printed.
    """
    if not config.path:
        raise UserError("path is not set", where="path", remedy="name a dataset's folder, path=DIR")
    report = index_dataset(config.path, adopt=config.adopt, refit=config.refit, verify=config.verify)
    for title, names in (
        ("index made", report.made),
        ("adopted", report.adopted),
        ("left out", report.left_out),
        ("not in dataset.json (adopt=true takes it in)", report.unlisted),
        ("drift", report.drift),
        ("fault", report.faults),
    ):
        for name in names:
            console.print(f"{title}: {name}", highlight=False, markup=False, soft_wrap=True)
    checked = ", every byte read" if config.verify else ""
    console.print(f"{report.shards} shards, {report.samples} samples{checked}: {config.path}", highlight=False)
    if report.faults:
        raise UserError(
            f"{len(report.faults)} faults", where=f"path={config.path}",
            remedy="restore the named shards from a copy, or remove their tars and curate those clips again",
        )  # fmt: skip
