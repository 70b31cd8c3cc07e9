"""A table of figures, as plain text, Markdown or LaTeX."""

from collections.abc import Sequence
from typing import Literal

TableFormat = Literal["table", "markdown", "latex"]


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], form: TableFormat = "table") -> str:
    """Rows under a header; the first column is what a row is of.

    Args:
        header: of every column, the first included.
        rows: of as many cells; an empty row is a gap, where there can be one.
    """
    if form == "latex":
        return _as_latex(header, rows)
    widths = [max(len(row[i]) for row in [header, *filter(None, rows)]) for i in range(len(header))]
    if form == "markdown":
        lines = [[cell.replace("|", "\\|") for cell in row] for row in [header, *filter(None, rows)]]
        bars = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([bars[0], f"| {' | '.join(['---', *['---:'] * (len(header) - 1)])} |", *bars[1:]])
    laid = [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        if row
        else ""
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in laid)


def _as_latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "\\toprule",
        _latex_row(header),
        "\\midrule",
    ]
    lines += [_latex_row(row) if row else "\\midrule" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


SPECIAL = {each: f"\\{each}" for each in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
}


def _latex_row(cells: Sequence[str]) -> str:
    escaped = ("".join(SPECIAL.get(character, character) for character in cell) for cell in cells)
    return " & ".join(escaped) + " \\\\"
