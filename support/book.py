"""The books of a run: flags from a dataclass, files replaced in one move, and refusals.

Whatever is wrong reaches the user as one sentence, through stop().
"""

import argparse
import contextlib
import csv
import dataclasses
import errno
import io
import json
import math
import os
import sys
import zipfile

import torch

import support
import toy_data
from support import machine
from support.machine import stop

try:
    import fcntl
except ImportError:                            # not on Windows
    fcntl = None


# --- Refusals -------------------------------------------------------------------------------------

@contextlib.contextmanager
def one_sentence():
    """What the machine cannot do arrives as one sentence. Other errors are ours and pass."""
    # A folder's name may have letters that the terminal does not know.
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        support.end_beginning()
        yield
    except KeyboardInterrupt:
        stop("interrupted; what was saved is whole, and a run that has a checkpoint.pt goes on "
             "with --resume")
    except OSError as error:
        name = error.filename or "a file or the standard output"
        stop(f"{name} cannot be read or written: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if machine.lost_the_others(error):
            stop("another process of the run has ended; what was saved is whole, go on with "
                 "--resume")
        if not out_of_memory(error):
            raise
        stop("out of memory; set --chunk first (0 is a whole step; others change a result by "
             "rounding at most), then lower --batch, --roots, --eval_images or --width")


def out_of_memory(error):
    """Whether an error says that memory ran out: Python's, torch's, CUDA's or cuBLAS's wording."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    wordings = ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(wording in str(error) for wording in wordings)


# --- Settings and flags ---------------------------------------------------------------------------

def option(default, help, low=None, high=math.inf, choices=None):
    """A field of a settings dataclass: its default, its words for --help, and what is allowed."""
    rule = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=rule)


def check(settings):
    """Stops if a value is none of its option's choices or lies outside its range."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        choices, low, high = (field.metadata[key] for key in ("choices", "low", "high"))
        if choices and value not in choices:
            allowed = ", ".join(map(str, choices))
            stop(f"--{field.name} must be one of {allowed}, not {value}")
        if low is not None and not (low <= value <= high and math.isfinite(value)):
            stop(f"--{field.name} must be from {low} to {high}, not {value}")


class Parser(argparse.ArgumentParser):
    """A parser that knows no abbreviations and refuses in one sentence."""

    def __init__(self, prog, description):
        keep_lines = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False,
                         formatter_class=keep_lines)

    def error(self, message):
        stop(f"{message} (python {self.prog} --help lists what is allowed)")


def parse(arguments, Settings, presets, description):
    """Flags to (settings, what was asked for by name, folder, whether to resume).

    What was asked for are the flags that were typed and, if --preset was typed, all that any
    preset decides. A resumed run must agree with it.
    """
    parser = Parser("train.py", description)
    parser.add_argument("--preset", choices=("auto", "cpu", "gpu", "tiny"), default=None,
                        help="auto (default): gpu where CUDA is, else cpu")
    parser.add_argument("--out", default=argparse.SUPPRESS,
                        help="folder of the run (default runs/MODEL-SEED)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for field in dataclasses.fields(Settings):
        parser.add_argument("--" + field.name, type=field.type, default=argparse.SUPPRESS,
                            metavar=field.type.__name__.upper(), help=help_of(field, presets))
    typed = vars(parser.parse_args(arguments))
    for name in ("out", "init"):               # as of a variable of the shell that is not set
        if typed.get(name) == "":
            stop(f"--{name} is empty: it must name a {'folder' if name == 'out' else 'checkpoint'}")
    preset, out, resume = typed.pop("preset"), typed.pop("out", ""), typed.pop("resume")

    decided = preset not in (None, "auto")
    if not decided:
        may_use_cuda = typed.get("device", "cuda") == "cuda"
        preset = "gpu" if may_use_cuda and torch.cuda.is_available() else "cpu"
    model = typed.get("model", "dit")
    s = Settings(**presets.get((preset, model), {}) | typed)

    asked = dict(typed)
    if decided:
        for name in {name for values in presets.values() for name in values}:
            asked[name] = getattr(s, name)
    return s, asked, out or os.path.join("runs", f"{s.model}-{s.seed}"), resume


def parse_sample(arguments):
    """Flags to (captions, tokens, checkpoint, out, settings to change in the checkpoint's)."""
    parser = Parser("train.py sample", "Draw what captions say.")
    parser.add_argument("captions", nargs="+",
                        help='such as "macro red striped circle top left on white"')
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt or pretrained.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--model", choices=("dit", "unet"), help="refuse any other network")
    parser.add_argument("--guidance", type=float, help="default: that of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", default="drawn.png", help="the picture (default drawn.png)")
    flags = parser.parse_args(arguments)
    try:
        tokens = toy_data.tokenize(flags.captions)
    except ValueError as error:
        stop(error)
    changes = {"device": flags.device, "seed": flags.seed}
    if flags.device == "cpu":
        changes["precision"] = "float32"       # bfloat16 is very slow on most CPUs
    if flags.guidance is not None:
        changes["guidance"] = flags.guidance
    if flags.model:
        changes["model"] = flags.model
    return flags.captions, tokens, flags.checkpoint, flags.out, changes


def help_of(field, presets):
    """A setting's words for --help, with its default and where a preset has another value."""
    text = f"{field.metadata['help']} (default {field.default!r}"
    for (preset, model), values in presets.items():
        if preset != "tiny" and values.get(field.name, field.default) != field.default:
            text += f"; {preset} {model}: {values[field.name]}"
    return text + ")"


# --- Files ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def unfinished(file):
    """The name to write a file under. It gets its own name in one move, when it is whole.

    Whatever happens, the file is the old one or the new, and nothing else is left.
    """
    name = file + ".tmp"
    try:
        yield name
        os.replace(name, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(name)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, file)
        raise


def replace(file, content):
    """Writes bytes to a file in one move."""
    with unfinished(file) as name, open(name, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def save(file, content):
    """A checkpoint. It is made in memory first, so that a full disk is met by replace alone."""
    memory = io.BytesIO()
    torch.save(content, memory)
    replace(file, memory.getvalue())


PLAIN = ("step", "seconds", "offsets", "products", "log", "probe")
STATES = ("model", "ema", "optimizer")


def save_run(run, file, form):
    """The checkpoint of a run: all that training changes."""
    content = {"format": form, "settings": dataclasses.asdict(run.settings)}
    content |= {name: getattr(run, name) for name in PLAIN}
    content |= {name: getattr(run, name).state_dict() for name in STATES}
    content |= {"loss": run.loss.item(), "generator": run.generator.get_state()}
    save(file, content)


def restore_run(run, content):
    """Puts what a checkpoint holds into a run that was built for its settings and its step."""
    for name in PLAIN:
        setattr(run, name, content[name])
    try:
        for name in STATES:
            getattr(run, name).load_state_dict(content[name])
        run.loss.fill_(content["loss"])
        run.generator.set_state(content["generator"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        stop("the checkpoint does not fit its own settings: it was changed, or is of another "
             "version of torch")
    if run.products is not None:
        run.plan_the_finetuning()


def load(file, Settings, form):
    """(settings, content) of a checkpoint of this form. Stops if it is missing or damaged."""
    if os.path.exists(file) and not os.path.isfile(file):
        stop(f"the checkpoint {file} cannot be read: it is no file")   # a pipe would never end
    try:
        # Torch writes a checksum for each tensor, but does not look at it when it loads one.
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                stop(f"{file} is damaged: it does not hold what was saved")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        stop(f"the checkpoint {file} cannot be read: {error.strerror}")
    except Exception as error:                 # torch.load raises many types for a damaged file
        if out_of_memory(error):
            raise
        stop(f"{file} is not a checkpoint, or only a part of one")
    needed = {"settings", "loss", "generator", *PLAIN, *STATES}
    whole = isinstance(content, dict) and needed <= content.keys()
    if not whole or content.get("format") != form:
        stop(f"{file} is not a checkpoint of this version of train.py")
    try:
        return Settings(**content["settings"]), content
    except (KeyError, TypeError):
        stop(f"{file} is a checkpoint of another version of train.py, with other settings")


def agreed(s, asked, folder):
    """The settings of a run to be resumed: s, those that it had, but for compile, graph and chunk.

    These three change a result by rounding at most, so they are taken as asked for. Stops if
    anything else that was asked for by name is not what the run has.
    """
    free = {name: asked[name] for name in ("compile", "graph", "chunk") if name in asked}
    s = dataclasses.replace(s, **free)
    for name, value in asked.items():
        if getattr(s, name) != value:
            stop(f"the run in {folder} has --{name} {getattr(s, name)}, not {value}")
    return s


def load_weights(file, model, s, form):
    """Puts the averaged weights of a checkpoint into the model. Stops if they do not fit it."""
    theirs, content = load(file, type(s), form)
    for name in ("model", "pixels", "width", "depth", "patch"):
        if getattr(theirs, name) != getattr(s, name):
            stop(f"{file} has --{name} {getattr(theirs, name)}, not {getattr(s, name)}")
    try:
        model.load_state_dict(content["ema"])
    except RuntimeError:
        stop(f"the weights in {file} do not fit this network: another vocabulary or version, "
             "or it is fine-tuned with adapters (--rank)")
    return model


def write_rows(log, probe, columns, folder):
    """log.csv and probe.jsonl, written anew from the rows that the checkpoint holds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for row in log:
        short = {}
        for name, value in row.items():
            short[name] = f"{value:.6g}" if isinstance(value, float) else value
        writer.writerow(short)
    replace(os.path.join(folder, "log.csv"), text.getvalue().encode())
    if probe:
        lines = [json.dumps(row, default=torch.Tensor.tolist) + "\n" for row in probe]
        replace(os.path.join(folder, "probe.jsonl"), "".join(lines).encode())


def read_log(folder):
    with open(os.path.join(folder, "log.csv"), newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_probe(folder):
    with open(os.path.join(folder, "probe.jsonl"), encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def check_unused(folder):
    """Stops unless the folder is absent or empty (a save that was killed may have begun in it)."""
    if not os.path.exists(folder):
        return
    if not os.path.isdir(folder) or set(os.listdir(folder)) - {"checkpoint.pt.tmp"}:
        stop(f"{folder} exists and is not empty: add --resume to go on with its run, "
             "or name another --out")


@contextlib.contextmanager
def owned(folder):
    """Within, the folder is this run's alone. The operating system frees it even after a kill.

    Where the system has no such locks (Windows, some network drives) nobody keeps watch.
    """
    if not os.path.isdir(folder):
        stop(f"there is no run in {folder}: its checkpoint.pt cannot be read")
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            stop(f"another run is at work in {folder}: wait for it, or name another --out")
    try:
        yield
    finally:
        if fcntl:
            os.close(handle)
