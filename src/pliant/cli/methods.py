"""`pliant methods`: the catalog."""

from __future__ import annotations

from rich.table import Table

from pliant.cli.console import loading, print_json, stdout
from pliant.cli.options import Json


def methods(as_json: Json = False) -> None:
    """List the methods: paper, kind, what they must observe, options."""
    with loading():
        from pliant.methods import catalog
    found = catalog()
    if as_json:
        print_json({
            name: {"kind": m.kind, "paper": m.paper, "needs": list(m.needs),
                   "summary": m.summary, "options": m.options}
            for name, m in found.items()
        })  # fmt: skip
        return
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 1, 0))
    table.add_column("method", min_width=max(map(len, found)))  # a name is never broken
    for title in ("kind", "needs", "options"):
        table.add_column(title)
    for name, m in found.items():
        options = ", ".join(f"{key}={value}" for key, value in m.options.items())
        table.add_row(f"[bold]{name}[/]\n{m.summary}\n[dim]{m.paper}[/]", m.kind,
                      "\n".join(m.needs), options)  # fmt: skip
    stdout().print(table)
