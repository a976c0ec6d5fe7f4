"""Reads the source of the package and holds its layout: who may import whom, and what appears nowhere.

A new module goes into :data:`LEVELS`. It may import modules of lower levels, and the modules of its own group; a group
is one part of the package that takes several files. Inside ``main()``, the function behind a module's command, anything
may be imported.
"""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import absent_modules

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmei_jax"

# Levels from the bottom up; within a level, groups. Names are relative to mmei_jax.
LEVELS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("types", "config", "config_values", "data_config", "pretraining_config", "command", "fingerprints"),
        ("activations",),
    ),
    (
        ("bin_packing",),
        ("compilation_cache",),
        ("compilations",),
        ("workdir", "part_times"),
        ("host_memory",),
        ("environment",),
        ("encoders.transformer",),
        ("losses", "pretraining_losses", "record_losses", "ranking_losses", "recognition_losses"),
        ("metrics", "mergeable", "ranking_metrics", "recognition_metrics", "record_metrics", "robustness_metrics"),
        ("records", "record_schema", "record_files", "record_gathering", "record_arrow", "record_writer"),
        ("metric_writer",),
        ("feedback.estimators", "feedback.log", "feedback.rows"),
        ("processes",),
        ("sharding",),
        ("collectives", "program_text"),
        ("optimizer",),
        (
            "simulation.aigc_int",
            "simulation.aigc_int_posterior",
            "simulation.aigc_int_calibration",
            "simulation.aigc_int_feedback",
            "simulation.aigc_int_figures",
            "simulation.aigc_int_report",
            "simulation.aigc_int_dataset",
            "simulation.render",
            "simulation.render_constants",
            "simulation.render_drawing",
            "simulation.render_face",
            "simulation.render_feedback",
            "simulation.render_media",
            "simulation.render_plan",
            "simulation.render_sheet",
            "simulation.render_text",
            "simulation.render_voice",
        ),
    ),
    (
        (
            "encoders.outputs",
            "encoders.preprocessing",
            "encoders.stack",
            "encoders.hugging_face_config",
            "encoders.bert",
            "encoders.audio_buckets",
            "encoders.audio_cnn",
            "encoders.convolution",
            "encoders.corpus_order",
            "encoders.freezing",
            "encoders.resnet",
            "encoders.text_packing",
            "encoders.tokenizer",
            "encoders.vit",
            "encoders.wav2vec2",
        ),
        ("host_devices",),
        (
            "profiling.ceilings",
            "profiling.liveness",
            "profiling.operations",
            "profiling.product_flops",
            "profiling.programs",
            "profiling.traces",
        ),
        (
            "device_split",
            "input_pipeline",
            "batching",
            "data_statistics",
            "packing",
            "padding",
            "ranking_targets",
            "record_order",
            "user_context",
        ),
        ("recommendation.catalogue_files", "row_files"),
        ("models.fusion", "models.heads"),
        ("predictions",),
        ("corruptions",),
        ("feedback.environment",),
        ("feedback.policies", "feedback.learning"),
        ("feedback.gate",),
        ("feedback.reward_models",),
        (
            "reports.report",
            "reports.table_report",
            "reports.table_sections",
            "reports.evaluated_table",
            "reports.paper_table",
            "reports.main_table",
            "reports.table_lines",
            "reports.paired_resampling",
            "reports.paired_seeds",
            "reports.claims",
            "reports.further_claims",
            "reports.feedback_figure",
            "reports.feedback_report",
            "reports.result_sections",
            "reports.run_sections",
            "reports.evaluated_run",
            "reports.record_table",
            "reports.resampling",
            "reports.robustness_card",
            "reports.robustness_figure",
            "reports.calibration",
            "reports.result_figures",
            "reports.training_figures",
            "reports.training_times",
            "reports.drawing",
            "reports.page",
            "reports.tables",
        ),
    ),
    (
        (
            "models.mmei",
            "models.baselines",
            "models.content_tower",
            "models.pretraining",
            "models.raw_encoders",
            "models.user_side",
        ),
        (
            "feedback.loop_config",
            "feedback.logged_visits",
            "feedback.slate_policies",
            "feedback.visits",
            "feedback.impressions",
            "feedback.segment_hashes",
            "feedback.off_policy",
            "feedback.loop",
            "feedback.online",
        ),
        (
            "encoders.architectures",
            "encoders.pretrained",
            "encoders.pretrained_comparison",
            "encoders.pretrained_files",
            "encoders.pretrained_tables",
            "encoders.pretrained_weights",
            "encoders.random_weights",
            "encoders.tokenizer_training",
            "encoders.torch_zip",
        ),
    ),
    (
        ("state", "checkpointing", "evaluation", "item_words", "origin", "raw_inputs", "word_cache"),
        (
            "extraction.import_features",
            "extraction.feature_sources",
            "extraction.label_columns",
            "extraction.class_weights",
            "extraction.clips",
            "extraction.clip_builder",
            "extraction.clip_lists",
            "extraction.conversation_context",
            "extraction.dataset_builders",
            "extraction.decoding",
            "extraction.doctor",
            "extraction.doctor_findings",
            "extraction.doctor_lists",
            "extraction.doctor_media",
            "extraction.doctor_shards",
            "extraction.audio_encoding",
            "extraction.encoder_loading",
            "extraction.encoding",
            "extraction.extract",
            "extraction.extract_beam",
            "extraction.extraction_config",
            "extraction.faces",
            "extraction.feature_pickles",
            "extraction.import_mosei",
            "extraction.media",
            "extraction.published_facts",
            "extraction.raw_media",
            "extraction.shard_extraction",
            "extraction.shard_units",
            "extraction.slate_files",
            "extraction.text_encoding",
            "extraction.utterance_lists",
            "extraction.vision_encoding",
            "extraction.splitting",
        ),
    ),
    (
        (
            "training",
            "train_step",
            "training_parts",
            "memory_estimates",
            "out_of_memory",
            "training_log",
            "warm_start",
            "replicas",
            "replica_memory",
            "replica_progress",
            "replica_training",
            "table_config",
            "table_training",
        ),
        (
            "recommendation.__main__",
            "recommendation.explanations",
            "recommendation.index_evaluation",
            "recommendation.index_files",
            "recommendation.index_writing",
            "recommendation.item_encoding",
            "recommendation.list_options",
            "recommendation.ranking_evaluation",
            "recommendation.reranking",
            "recommendation.run_reranking",
            "recommendation.search",
            "recommendation.top_k",
            "recommendation.users",
        ),
    ),
    (
        ("predict",),
        ("affect_profiles",),
        ("robustness", "robustness_files"),
        ("feedback.pools", "feedback.run"),
        (
            "serving.__main__",
            "serving.checking",
            "serving.encoder_functions",
            "serving.exporting",
            "serving.functions",
            "serving.loading",
            "serving.manifest",
            "serving.signatures",
        ),
        (
            "profiling.__main__",
            "profiling.figure",
            "profiling.measurement",
            "profiling.profile",
            "profiling.report",
            "profiling.roofline",
            "profiling.candidates",
            "profiling.lowering",
            "profiling.predictions",
            "profiling.topologies",
            "profiling.topology",
            "profiling.topology_report",
            "profiling.tpu_times",
        ),
    ),
    (("table_evaluation",),),
)
# Used without the rest of the package; its names are found when they are first used.
PUBLIC = PACKAGE / "encoders"
# What turns files into the parameters of encoders.
CONVERSION = next(group for groups in LEVELS for group in groups if "encoders.pretrained" in group)
LEVEL_OF = {name: level for level, groups in enumerate(LEVELS) for group in groups for name in group}
GROUP_OF = {name: group for groups in LEVELS for group in groups for name in group}

# Folders beside the package: a wheel has none of them.
OUTSIDE_WHEEL = {"benchmarks", "configs", "data", "eval", "tests", "train"}
FOREIGN_FRAMEWORKS = {"keras", "tensorflow", "tensorflow_probability", "torch", "torchvision"}
# Works without TensorFlow as these two modules use it, and is seen by no other.
DATASETS_LIBRARY = "tensorflow_datasets"
DATASETS_MODULES = {"extraction.clip_builder", "extraction.dataset_builders"}
PICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Subclass the unpickler so that it finds nothing but what they list; tests of the same names attack them.
RESTRICTED_UNPICKLERS = {PACKAGE / "encoders" / "torch_zip.py", PACKAGE / "extraction" / "feature_pickles.py"}
# What a model must not see: configuration files, flags, files, optimizers.
UNSEEN_BY_MODELS = {
    "absl",
    "argparse",
    "grain",
    "io",
    "json",
    "ml_collections",
    "optax",
    "orbax",
    "os",
    "pathlib",
    "pyarrow",
}
# Import names of distributions that are not called like what they install.
IMPORT_NAMES = {"absl_py": "absl", "markdown_it_py": "markdown_it", "orbax_checkpoint": "orbax", "pillow": "PIL"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
ENTRY_POINTS = [path for path in (ROOT / "train.py", ROOT / "eval.py") if path.exists()]
RUN_TIME_FILES = [*sorted(PACKAGE.rglob("*.py")), *ENTRY_POINTS]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(node: ast.AST, *, with_main: bool) -> list[tuple[str, int]]:
    """Every module that the node's code imports, as (dotted name, line); without main()'s own if so asked."""
    found: list[tuple[str, int]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [(alias.name, child.lineno) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            # "from a import b" may name the module a.b or a name inside a: both are kept, the caller knows which exist.
            found += [(f"{child.module}.{alias.name}", child.lineno) for alias in child.names]
        elif with_main or not (isinstance(child, ast.FunctionDef) and child.name == "main"):
            found += _imports(child, with_main=with_main)
    return found


def _imported_modules(path: Path, *, with_main: bool) -> dict[str, int]:
    """Modules of the package that a file imports, by their name relative to it, with the line."""
    found = {}
    for dotted, line in _imports(_tree(path), with_main=with_main):
        parts = dotted.split(".")
        if parts[0] != "mmei_jax":
            continue
        for length in (len(parts), len(parts) - 1):
            name = ".".join(parts[1:length])
            if name in MODULES:
                found[name] = line
                break
        else:
            is_package = PACKAGE.joinpath(*parts[1:]).is_dir()
            assert is_package, f"{_name(path)}:{line} imports {dotted}, which is not there"
    return found


def _import_roots(path: Path) -> dict[str, int]:
    return {dotted.split(".")[0]: line for dotted, line in _imports(_tree(path), with_main=True)}


def test_every_module_has_a_level():
    missing = sorted(set(MODULES) - set(LEVEL_OF))
    assert not missing, f"give these modules a place in LEVELS of tests/architecture_test.py: {', '.join(missing)}"


def test_every_level_names_each_module_once():
    names = [name for groups in LEVELS for group in groups for name in group]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", sorted(set(MODULES) & set(LEVEL_OF)))
def test_module_imports_lower_levels_only(name):
    upward = [
        f"line {line}: {imported} (level {LEVEL_OF[imported]})"
        for imported, line in _imported_modules(MODULES[name], with_main=False).items()
        if imported in LEVEL_OF and LEVEL_OF[imported] >= LEVEL_OF[name] and imported not in GROUP_OF[name]
    ]
    assert not upward, f"{name} is of level {LEVEL_OF[name]} and must not import {'; '.join(upward)}"


def test_imports_have_no_circles():
    graph = {name: set(_imported_modules(path, with_main=False)) for name, path in MODULES.items()}
    while leaves := {name for name, imported in graph.items() if not imported & set(graph)}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert not graph, f"modules that import each other in a circle, or hang on one: {sorted(graph)}"


@pytest.mark.parametrize("path", RUN_TIME_FILES, ids=_name)
def test_file_uses_neither_foreign_frameworks_nor_pickle(path):
    roots = _import_roots(path)
    allowed = {"pickle"} if path in RESTRICTED_UNPICKLERS else set()
    assert not (FOREIGN_FRAMEWORKS | PICKLING) & set(roots) - allowed
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "loads") and isinstance(node.value, ast.Name):
            assert node.value.id not in PICKLING, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False", f"line {node.value.lineno}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - DATASETS_MODULES))
def test_only_dataset_builders_use_the_datasets_library(name):
    assert DATASETS_LIBRARY not in _import_roots(MODULES[name])


@pytest.mark.parametrize("path", sorted(MODULES.values()), ids=_name)
def test_package_does_not_import_what_its_wheel_lacks(path):
    assert not OUTSIDE_WHEEL & set(_import_roots(path))


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith(("models.", "encoders.")) and name not in CONVERSION]
)
def test_model_sees_no_configuration_files_flags_or_optimizers(name):
    assert not UNSEEN_BY_MODELS & set(_import_roots(MODULES[name]))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "config"])
def test_config_dict_ends_at_config_module(name):
    imported = {dotted.partition(".")[0] for dotted, _ in _imports(_tree(MODULES[name]), with_main=False)}
    assert "ml_collections" not in imported


# command starts the entry points and parses for them.
@pytest.mark.parametrize("name", sorted(set(MODULES) - {"command"}))
def test_only_a_module_with_a_command_parses_flags(name):
    tree = _tree(MODULES[name])
    parses = {"absl.flags", "argparse"} & {
        prefix for dotted, _ in _imports(tree, with_main=True) for prefix in (dotted, dotted.rpartition(".")[0])
    }
    has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    assert not parses or has_main, f"{name} imports {parses} and has no main()"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "sharding"])
def test_only_sharding_names_mesh_axes(name):
    forbidden = {"PartitionSpec", "P", "pmap", "AxisType"}
    for node in ast.walk(_tree(MODULES[name])):
        if isinstance(node, ast.ImportFrom) and node.module in ("jax", "jax.sharding"):
            assert not forbidden & {alias.name for alias in node.names}, f"line {node.lineno}"
            assert node.module == "jax.sharding" or "make_mesh" not in {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute):
            assert node.attr not in forbidden - {"P"}, f"line {node.lineno}: {node.attr}"
            is_jax = isinstance(node.value, ast.Name) and node.value.id == "jax"
            assert not (is_jax and node.attr == "make_mesh"), f"line {node.lineno}: jax.make_mesh"


def test_training_starts_without_the_drawing_library():
    reached, remaining = set(), {"training"}
    while remaining:
        reached |= remaining
        remaining = {
            name for found in remaining for name in _imported_modules(MODULES[found], with_main=False)
        } - reached
    assert "evaluation" in reached
    assert not [name for name in reached if "matplotlib" in _import_roots(MODULES[name])]


@pytest.mark.parametrize("path", RUN_TIME_FILES, ids=_name)
def test_no_handler_catches_everything(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: except without a type"


@pytest.mark.parametrize("path", [*RUN_TIME_FILES, *sorted((ROOT / "configs").glob("*.py"))], ids=_name)
def test_files_stay_short(path):
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= (60 if path in ENTRY_POINTS else 400)


def test_files_are_named_after_what_they_hold():
    assert not [name for name in MODULES if re.fullmatch(r"(utils?|common|helpers?|misc)", name.rpartition(".")[2])]


def test_every_folder_of_the_package_is_a_package_that_imports_nothing():
    for folder in {path.parent for path in MODULES.values()}:
        assert (folder / "__init__.py").exists(), f"{_name(folder)}/__init__.py is missing"
        if folder != PUBLIC:
            assert not _imports(_tree(folder / "__init__.py"), with_main=True), f"{_name(folder)}/__init__.py imports"


def test_public_package_imports_its_modules_when_they_are_used():
    tree = _tree(PUBLIC / "__init__.py")
    at_once = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    roots = {dotted.split(".")[0] for node in at_once for dotted, _ in _imports(ast.Module([node], []), with_main=True)}
    assert roots <= {"importlib", "typing"}


def test_package_imports_declared_dependencies_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    distributions = [re.match(r"[\w.-]+", line).group().replace("-", "_") for line in project["dependencies"]]
    known = {IMPORT_NAMES.get(name, name) for name in distributions} | set(sys.stdlib_module_names) | {"mmei_jax"}
    # Of an extra: what else imports it would fail for most.
    optional = {
        "mmei_jax/extraction/faces.py": {"cv2"},
        "mmei_jax/extraction/extract_beam.py": {"apache_beam"},
    }
    undeclared = {
        _name(path): sorted(set(_import_roots(path)) - known - optional.get(_name(path), set()))
        for path in RUN_TIME_FILES
    }
    assert not {name: roots for name, roots in undeclared.items() if roots}


def test_package_works_where_neither_torch_nor_tensorflow_is_installed():
    # Some dependencies import torch where they find it, so what is loaded says little: here it is not to be found.
    program = absent_modules.hide(FOREIGN_FRAMEWORKS) + (
        f"import importlib\nfor name in {sorted(MODULES)!r}: importlib.import_module('mmei_jax.' + name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
