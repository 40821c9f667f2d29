"""What holds over all three scripts: what they share, their outline, and how they start and end."""

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, SCRIPTS, TOY, call, run, start, train, wait_until
from editing import edited_trainer

SECTIONS = {
    "mel_generator.py": "Constants Audio Features Augmentation Files Main",
    "cremad_custom2.py": (
        "Constants Data Augmentation Model Training Evaluation Reports Files Main"
    ),
    "custom2_tester.py": (
        "Constants Audio Features Model Checkpoint Classification Pictures Reports Files Main"
    ),
}
SHARED_SECTIONS = ("Audio", "Features", "Model")
# Each script's command line and story are its own.
OWN = {"main", "parse_args", "report"}
# A few of those that must be found in two scripts: an empty comparison would prove nothing.
SHARED = {
    "load_audio",
    "log_mel",
    "stft_blocks",
    "mel_filters",
    "wrong_mel_settings",
    "EmotionClassifier",
    "BidirectionalLSTM",
    "atomic_write",
    "write_csv",
    "folder_lock",
    "in_shard",
    "SteadyStream",
    "UserError",
}

# --------------------------------------------------------------------------------------
# The source


def source(script) -> str:
    return (ROOT / script).read_text(encoding="utf-8")


def names_of(statement) -> list[str]:
    """The names that a top-level statement defines."""
    if hasattr(statement, "name"):
        return [statement.name]
    targets = getattr(statement, "targets", [])
    nodes = itertools.chain.from_iterable(map(ast.walk, targets))
    return [node.id for node in nodes if isinstance(node, ast.Name)]


def definitions(script) -> dict[str, str]:
    """Source of each name that a script defines at its top level, decorators included."""
    lines = source(script).splitlines()
    found = {}
    for statement in ast.parse(source(script)).body:
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(d.lineno for d in decorators)])
        body = "\n".join(lines[first - 1 : statement.end_lineno])
        found |= dict.fromkeys(names_of(statement), body)
    return found


def sections(script) -> dict[str, str]:
    """Text of each section, by its name: the first word after the line of dashes."""
    _, *parts = source(script).split("\n# " + "-" * 86 + "\n")
    return {part.split(maxsplit=2)[1].rstrip(":"): part.partition("\n")[2] for part in parts}


def functions(tree, prefix=""):
    """Name and node of each public function and method."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node


def imported_modules(path) -> set[str]:
    """The modules that a file imports, anywhere in it: the first part of their names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").split(".")[0])
    return found


def test_a_name_in_two_scripts_has_one_body():
    shared = set()
    different = set()
    for one, other in itertools.combinations(map(definitions, SCRIPTS), 2):
        both = one.keys() & other.keys()
        shared |= both
        different |= {name for name in both if one[name] != other[name]}
    assert shared >= SHARED
    assert different - OWN == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_the_datas_order(script):
    assert list(sections(script)) == SECTIONS[script].split()


def test_shared_sections_are_the_same_to_the_letter():
    for name in SHARED_SECTIONS:
        texts = [text[name] for text in map(sections, SCRIPTS) if name in text]
        assert len(texts) == 2, name
        assert texts[0] == texts[1], name
        assert texts[0].count("\n") > 50


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_holds_the_command_line_and_main(script):
    last = list(definitions(script))[-1]
    assert last == "main"
    assert source(script).endswith('if __name__ == "__main__":\n    sys.exit(main())\n')


def test_the_trainers_constants_stand_near_the_top():
    lines = source("cremad_custom2.py").splitlines()
    docstring_end = ast.parse(source("cremad_custom2.py")).body[0].end_lineno
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("# Constants"))
    assert first - docstring_end <= 40


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_none_of_each_other(script):
    modules = {name.removesuffix(".py") for name in SCRIPTS}
    assert imported_modules(ROOT / script) & modules == set()


def test_no_test_file_imports_another():
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    assert len(tests) > 3
    for path in tests:
        assert not {name for name in imported_modules(path) if name.startswith("test_")}, path.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_public_functions_say_what_they_do_and_return(script):
    missing = []
    for name, node in functions(ast.parse(source(script))):
        if ast.get_docstring(node) is None:
            missing.append(f"{name} has no docstring")
        if node.returns is None:
            missing.append(f"{name} has no return annotation")
    assert missing == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_are_caught_broadly_around_foreign_parsers_alone(script):
    """`except Exception` elsewhere would tell a bug of ours as a fault of the user's file."""
    for node in ast.walk(ast.parse(source(script))):
        if not isinstance(node, ast.Try):
            continue
        handlers = [h for h in node.handlers if h.type is None or "Exception" in ast.unparse(h)]
        handlers = [h for h in handlers if h.type is None or ast.unparse(h.type) == "Exception"]
        if handlers:
            body = "\n".join(map(ast.unparse, node.body))
            assert "torch.load(" in body or "np.lib.format." in body, body
            assert len(node.body) <= 3  # and little else


# --------------------------------------------------------------------------------------
# How they start


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_arguments(script):
    assert f"python {script}" in call(script.removesuffix(".py"), "--help")
    assert "error: " in run(ROOT / script, "--nonsense", "1", code=2)


@pytest.mark.parametrize("arguments", [("--epochs", "2"), ("mels",), ("-x",), ("--RESUME",)])
def test_any_argument_of_the_trainer_is_told_where_the_constants_are(arguments):
    text = call("cremad_custom2", *arguments, code=2)
    assert arguments[0] in text
    assert "constants" in text
    assert "cremad_custom2.py" in text


# Prints what the import of a script changed. What it imports itself comes first: that a
# library sets a variable of its own is no doing of the script.
IMPORT = """\
    import ast, importlib, json, logging, os, signal, sys, threading, warnings
    from pathlib import Path

    script = Path(sys.argv[1])
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            importlib.import_module(name)
    import matplotlib, numpy, pandas, torch

    def state():
        settings = {key: repr(value) for key, value in dict.items(matplotlib.rcParams)}
        options = repr(pandas.options.d) if hasattr(pandas.options, "d") else ""
        signals = sorted(signal.valid_signals())
        return {
            "environment": dict(os.environ),
            "backend": settings,
            "pandas": options,
            "numpy": [repr(numpy.geterr()), repr(numpy.get_printoptions())],
            "signals": [repr(signal.getsignal(s)) for s in signals if int(s) < 32],
            "mask": repr(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "warnings": repr(warnings.filters),
            "streams": [repr(sys.stdin), repr(sys.stdout), repr(sys.stderr), repr(sys.excepthook)],
            "threads": [threading.active_count(), torch.get_num_threads()],
            "torch": [
                torch.backends.cudnn.allow_tf32,
                torch.backends.cudnn.benchmark,
                torch.are_deterministic_algorithms_enabled(),
                repr(torch.get_default_dtype()),
                torch.get_rng_state().sum().item(),
            ],
            "folder": os.getcwd(),
            "files": sorted(os.listdir()),
            "logging": logging.root.level,
        }

    before = state()
    sys.path.insert(0, str(script.parent))
    importlib.import_module(script.stem)
    after = state()
    print([name for name in before if before[name] != after[name]])
    """


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_changes_nothing_in_the_importer(script, tmp_path):
    plain = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MPLBACKEND", "NUMBA_DISABLE_JIT")
    environment = {name: value for name, value in os.environ.items() if name not in plain}
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(IMPORT), str(ROOT / script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------
# How they end: Ctrl-C, closed pipes


def interrupt(process) -> str:
    """Ctrl-C, as a terminal sends it to a whole process group; returns what was printed.

    That the output ends shows that no process of the group is left to write to it.
    """
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert "Traceback" not in text, text
    assert process.returncode == 130, text
    return text


@pytest.fixture(scope="module")
def many(corpus, tmp_path_factory):
    """Names enough for a run that lasts: 40 links to each clip."""
    folder = tmp_path_factory.mktemp("many")
    for path in corpus.iterdir():
        for i in range(40):
            (folder / f"{i}{path.name}").symlink_to(path)
    return folder


def test_ctrl_c_in_the_generator_stops_and_goes_on_later(corpus, mels, many, tmp_path):
    folders = ("--input_dir", many, "--output_dir", tmp_path)
    options = ("--n_augmentations", 8, "--workers", 2)
    process = start(ROOT / "mel_generator.py", *folders, *options)
    wait_until(lambda: list(tmp_path.glob("*/*.npy")))
    text = interrupt(process)
    assert "To go on, run again" in text.splitlines()[-1]
    done = {path: path.stat().st_ino for path in tmp_path.glob("*/*.npy")}
    assert 0 < len(done) < 48 * 40 * 9
    assert not list(tmp_path.glob("*/.*.tmp"))
    process = start(ROOT / "mel_generator.py", *folders, *options)
    wait_until(lambda: len(list(tmp_path.glob("*/*.npy"))) > len(done))
    interrupt(process)
    assert {path: path.stat().st_ino for path in done} == done


def test_ctrl_c_in_the_trainer_says_how_to_go_on(mels, tmp_path):
    history = tmp_path / "output/history.csv"
    paths = {"MEL_DIR": str(mels), "OUTPUT_DIR": str(tmp_path / "output")}
    process = start(edited_trainer(tmp_path, **TOY | paths | {"EPOCHS": 500, "PATIENCE": 500}))
    wait_until(lambda: history.exists() and history.read_text().count("\n") > 2)
    text = interrupt(process)
    assert "RESUME = True" in text
    done = history.read_text().count("\n") - 1
    assert done >= 2
    text = train(tmp_path, mels, EPOCHS=done + 1, PATIENCE=500, RESUME=True)
    assert f"after epoch {done}." in text
    assert history.read_text().count("\n") == done + 2


def test_ctrl_c_in_the_tester_says_how_to_go_on(trained, many, tmp_path):
    model = ("--model_path", trained / "best_model.pth", "--cpu", "--batch_size", 2)
    folders = ("--input_dir", many, "--output_dir", tmp_path)
    process = start(ROOT / "custom2_tester.py", *folders, *model, "--workers", 2, "--visualize")
    partial = tmp_path / "classification_results.csv.partial"
    wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 8)
    text = interrupt(process)
    assert "--resume" in text
    kept = partial.read_bytes().count(b"\n")
    assert 8 < kept < 48 * 40
    assert not (tmp_path / "classification_results.csv").exists()


def command_line(name, corpus, trained, output_dir):
    """A script's command for the small corpus."""
    folders = ("--input_dir", corpus, "--output_dir", output_dir, "--workers", 1)
    if name == "mel_generator.py":
        return (name, *folders, "--no_augment")
    return (name, *folders, "--model_path", trained / "best_model.pth", "--cpu")


@pytest.mark.parametrize("script", ["mel_generator.py", "custom2_tester.py"])
def test_a_closed_pipe_ends_the_printing_and_not_the_run(script, corpus, trained, tmp_path):
    """As `script | head -1` does; the bar's pipe too."""
    name, *arguments = command_line(script, corpus, trained, tmp_path)
    process = start(ROOT / name, *arguments)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    if script == "mel_generator.py":
        config = json.loads((tmp_path / "mel_config.json").read_text())
        assert config["n_originals"] == 48
        assert (tmp_path / "skipped.csv").exists()
    else:
        table = (tmp_path / "classification_results.csv").read_text()
        assert table.count("\n") == 49
        assert (tmp_path / "summary.csv").exists()
        assert not list(tmp_path.glob("*.partial"))


def run_without(streams, script, *arguments, code=0) -> str:
    """Runs a script whose shell closed streams, as 2>&- and pythonw do; returns what it says."""
    shell = ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, str(script)]
    done = subprocess.run([*shell, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_an_error_stream_errors_are_told_all_the_same(script, tmp_path):
    if script == "cremad_custom2.py":
        path = edited_trainer(tmp_path, MEL_DIR=str(tmp_path / "absent"))
        text = run_without("2>&-", path, code=1)
    else:
        name, *arguments = command_line(script, tmp_path / "absent", tmp_path, tmp_path / "out")
        text = run_without("2>&-", ROOT / name, *arguments, code=1)
    assert str(tmp_path) in text
    assert "Traceback" not in text


def test_without_any_stream_a_run_ends_well(corpus, mels, trained, tmp_path):
    """The streams' numbers go to the next files that are opened: nothing may be printed there."""
    name, *arguments = command_line("mel_generator.py", corpus, trained, tmp_path / "mels")
    run_without("<&- >&- 2>&-", ROOT / name, *arguments)
    made = {path.name: path.read_bytes() for path in (tmp_path / "mels").glob("*/*.npy")}
    assert len(made) == 48
    assert made.items() <= {path.name: path.read_bytes() for path in mels.glob("*/*.npy")}.items()
    name, *arguments = command_line("custom2_tester.py", corpus, trained, tmp_path / "out")
    run_without("<&- >&- 2>&-", ROOT / name, *arguments)
    assert (tmp_path / "out/classification_results.csv").read_text().count("\n") == 49
