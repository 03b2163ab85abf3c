"""The house keeps its shape: flat modules that import only downward, say what they are for, and stay small.

`LAYERS` is the order; a module may import only modules that stand below it. Imports inside functions count. Names in
the lazy registry do not: they are resolved only when a user has chosen them.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
MAX_LINES = 450
MIN_DOCSTRING_WORDS = 15

# From top to bottom.
LAYERS = (
    "main",
    "publishing",
    "command_line",
    "sweep",
    "launchers",
    "process_launcher",
    "ray_launcher",
    "jobs",
    "predictive_prefetch",
    "kv_paging",
    "inference_baseline",
    "component_cli",
    "quality",
    "tensorboard_tracker",
    "mlflow_tracker",
    "trackers",
    "output_files",
    "variant_runs",
    "variant_tables",
    "component_tables",
    "max_context",
    "fidelity",
    "reading",
    "generation",
    "device_meters",
    "paged_layer",
    "standing_step",
    "decode_attention",
    "layer_pages",
    "paged_sequence",
    "query_foresight",
    "hf_attention",
    "lockstep",
    "resolution",
    "device_page_table",
    "page_kernels",
    "pool_reads",
    "page_store",
    "host_pages",
    "page_layout",
    "page_table",
    "padding",
    "stage_clock",
    "page_selection",
    "paged_attention",
    "page_heatmap",
    "prefetch_plots",
    "exports",
    "report_html",
    "report_figures",
    "report_parts",
    "report_facts",
    "report_style",
    "plot_list",
    "run_plots",
    "quality_plots",
    "quality_budget",
    "paper_plots",
    "plots",
    "reporting",
    "folder_tables",
    "regression_gate",
    "result_tables",
    "quality_tables",
    "run_settings",
    "table_formats",
    "html_text",
    "text_tables",
    "progress",
    "folder_comparison",
    "quality_frame",
    "comparison",
    "definitions",
    "shards",
    "result_store",
    "result_schema",
    "result_blocks",
    "sweep_pace",
    "plan_table",
    "run_estimates",
    "result_frame",
    "planning",
    "prose_task",
    "quality_tasks",
    "task_texts",
    "workloads",
    "run_statistics",
    "intervals",
    "models",
    "model_routes",
    "converted_models",
    "model_shapes",
    "experiments",
    "parameter_sweeps",
    "default_config",
    "config_messages",
    "config_schema",
    "yaml_source",
    "run_specs",
    "metrics",
    "yardstick",
    "recorder",
    "timeline",
    "prefetch_threshold",
    "page_predictors",
    "page_selectors",
    "page_policies",
    "fading",
    "cache_settings",
    "shadow_lru",
    "links",
    "utils",
    "registry",
)

# All others, also those not written yet, can be imported without torch: `--plan`, `--help` and the reading of configs
# and results start in a fraction of a second.
NEED_TORCH = {
    "sweep",
    "launchers",
    "process_launcher",
    "ray_launcher",
    "jobs",
    "component_cli",
    "max_context",
    "generation",
    "predictive_prefetch",
    "kv_paging",
    "inference_baseline",
    "device_meters",
    "paged_layer",
    "standing_step",
    "decode_attention",
    "layer_pages",
    "padding",
    "stage_clock",
    "paged_sequence",
    "lockstep",
    "resolution",
    "hf_attention",
    "page_store",
    "pool_reads",
    "device_page_table",
    "page_kernels",
    "page_selection",
    "host_pages",
    "paged_attention",
    "query_foresight",
    "quality",
    "fidelity",
    "reading",
}

MODULES = sorted(path.stem for path in PROJECT.glob("*.py") if path.stem not in ("setup", "conftest"))


def source_of(module: str) -> str:
    return (PROJECT / f"{module}.py").read_text(encoding="utf-8")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"


def own_imports(tree: ast.AST, inside: str = "") -> list[tuple[str, str]]:
    """(module of this project, function it is imported in or "") of every import, also those inside functions.

    Left out is what is only imported for type checkers.
    """
    found: list[tuple[str, str]] = []
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [(name.split(".")[0], inside) for name in names if name.split(".")[0] in MODULES]
        if is_type_checking(node):
            for alternative in node.orelse:
                found += own_imports(ast.Module([alternative], []), inside)
            continue
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        found += own_imports(node, node.name if is_function else inside)
    return found


# --- layers -------------------------------------------------------------------------------------------------------


def test_the_reader_of_imports_sees_functions_and_not_type_checkers():
    program = (
        "import links\n"
        "from metrics import ratio\n"
        "if TYPE_CHECKING:\n    import sweep\nelse:\n    import utils\n"
        "def main():\n    if 1:\n        from registry import MODES\n"
        "class A:\n    def f(self):\n        import workloads as w, json\n"
    )
    assert own_imports(ast.parse(program)) == [
        ("links", ""),
        ("metrics", ""),
        ("utils", ""),
        ("registry", "main"),
        ("workloads", "f"),
    ]


def test_every_module_has_its_place_in_the_order():
    unlisted = sorted(set(MODULES) - set(LAYERS))
    assert not unlisted, f"give {unlisted} a place in LAYERS in {Path(__file__).name}, above all that they import"
    gone = sorted(set(LAYERS) - set(MODULES))
    assert not gone, f"{gone} in LAYERS in {Path(__file__).name} are no modules any more; take them out"
    assert len(set(LAYERS)) == len(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_below_it(module):
    if module not in LAYERS:
        pytest.fail(f"{module} has no place in LAYERS yet")
    below = LAYERS[LAYERS.index(module) + 1 :]
    upward = [
        f"{imported} (in {inside or 'the module'})"
        for imported, inside in own_imports(ast.parse(source_of(module)))
        if imported not in below
    ]
    assert not upward, f"{module} imports what does not stand below it in LAYERS: {', '.join(upward)}"


def test_modules_that_need_no_torch_do_not_import_it_even_through_others():
    free = [module for module in MODULES if module not in NEED_TORCH]
    program = (
        "import importlib, sys\n"
        f"for module in {free!r}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    if heavy:\n"
        "        sys.exit(f'importing {module} imports {sorted(heavy)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_what_it_is_for(module):
    docstring = ast.get_docstring(ast.parse(source_of(module))) or ""
    assert len(docstring.split()) >= MIN_DOCSTRING_WORDS, f"{module}.py needs a docstring that says what it is for"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_postpones_its_annotations(module):
    assert "from __future__ import annotations" in source_of(module).splitlines()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_enough_to_read_in_one_go(module):
    n_lines = len(source_of(module).splitlines())
    assert n_lines <= MAX_LINES, f"{module}.py has {n_lines} lines; find the second idea in it, and give it a file"


def test_the_package_installs_every_module_and_no_other():
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is younger than Python 3.10
    (listed,) = re.findall(r"^py-modules = (\[.*?\])", text, re.DOTALL | re.MULTILINE)
    assert ast.literal_eval(listed) == MODULES


def tracked_texts() -> dict[str, str]:
    """Path and text of every file in version control, other than binary ones."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout, so nothing says which files belong to the project")
    texts = {}
    for name in filter(None, done.stdout.decode().split("\0")):
        path = PROJECT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            texts[name] = content.decode("utf-8")
    return texts


def test_no_file_names_a_machine_or_a_place_where_packages_come_from():
    slash = "/"  # written apart, so that this file does not name what it looks for
    folders = [slash + folder + slash for folder in ("work", "root", "tmp/w")]
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("conda", "io"))]
    options = ["-".join(parts) for parts in (("index", "url"), ("find", "links"), ("trusted", "host"))]
    found = [
        f"{name}:{number}: {forbidden}"
        for name, text in tracked_texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        for forbidden in (*folders, *hosts, *options)
        if forbidden in line.lower()
    ]
    assert not found, "\n".join(found)
