"""The plans of all recipes for published models, as the table in docs/planning.md.

python benchmarks/plans.py            # print the table
python benchmarks/plans.py --write    # write it into the page, and each recipe's line into the recipe
"""

import re
import sys
from pathlib import Path

from nextscale.config.files import packaged_recipes
from nextscale.config.recipe import load_recipe
from nextscale.config.rehearsal import plan_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- benchmarks/plans.py writes from here -->", "<!-- to here -->"
# The GPUs that each model's recipes are meant for, and a recipe of its own.
PLACES = {
    "var-d16": (("rtx-4090-24gb", 1),),
    "var-d30": (("a100-80gb", 1), ("h100-80gb", 1)),
    "var-d36": (("h100-80gb", 8),),
    "switti-512": (("rtx-4090-24gb", 1), ("h100-80gb", 1)),
    "var-clip": (("h100-80gb", 1),),
    "var-d30-combined-lora": (("a100-40gb", 1),),
}
RECIPES = PAGE.parents[1] / "src" / "nextscale" / "recipes"
EXPECTED = r"# Expected: (.+) GB and (.+) s a step on (\d+) x ([\w-]+\w)"
HEAD = """| recipe | GPUs | peak of one process, GB | fits | PFLOP a step | s a step | hours for all steps |
| --- | --- | --- | --- | --- | --- | --- |"""


def table() -> str:
    rows = [HEAD]
    for name in packaged_recipes():
        recipe = load_recipe(name)
        for gpu, num_gpus in PLACES.get(name, PLACES.get(recipe.model, ())):
            plan = plan_recipe(recipe, gpu, num_gpus)
            hours = plan.seconds * recipe.run.max_steps / 3600
            cells = [name, f"{num_gpus} x {gpu}", f"{plan.peak / 1e9:.1f}", "yes" if plan.fits else "no"]
            cells += [f"{sum(plan.flops.values()) / 1e15:.2f}", f"{plan.seconds:.1f}", f"{hours:.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(table())
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")
    for name in packaged_recipes():
        text = (RECIPES / f"{name}.yaml").read_text()
        if found := re.search(EXPECTED, text):
            plan = plan_recipe(load_recipe(name), found[4], int(found[3]))
            told = f"{plan.peak / 1e9:.0f} GB and {plan.seconds:.2g} s a step on {found[3]} x {found[4]}"
            (RECIPES / f"{name}.yaml").write_text(text.replace(found[0], f"# Expected: {told}"))


if __name__ == "__main__":
    main()
