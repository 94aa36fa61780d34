"""Compiles every CUDA kernel, without a GPU: no warning, no register spill, no local memory. Then counts in the
machine code what docs/kernels.md tells of the kernels, and compares. `--write` writes it.

Run by `make cuda-check`. Exits with 1 if something is wrong and with 2 if a tool is missing.
"""

import difflib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = "-O3 --expt-relaxed-constexpr -std=c++17 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v"
# Kernels that may have a stack frame of so many bytes, with the reason that is in their source.
FRAMES: dict[str, int] = {}

# Of tiles_kernel, from csrc/cuda/tiles.cuh, for one thread.
ELEMENTS = 64  # accumulators, as 8 rows x 8 columns
MAXIMA = 2 * 8 * 7  # of 8 rows and of 8 columns, 8 values each
COPIES = 4  # of 16 bytes, for one stage: 2 x 128 rows x 64 bytes by 256 threads


class Missing(Exception):
    """A tool is not there."""


# --- what ptxas and nvdisasm print ----------------------------------------------------------------------------------


def parse_ptxas(text):
    """{mangled name: {"registers": , "shared": , "frame": , "stores": , "loads": }} of kernels and of functions."""
    found, name = {}, None
    for line in text.splitlines():
        if at := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line):
            name = at[1] or at[2]
            found.setdefault(name, {})
        elif at := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[name].update(frame=int(at[1]), stores=int(at[2]), loads=int(at[3]))
        elif at := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name].update(registers=int(at[1]), shared=int(shared[1]) if shared else 0)
    return found


def faults(kernel, architecture, use):
    """What is wrong with that use of resources, one line each."""
    spills = [f"{use[key]} bytes of spill {key}" for key in ("stores", "loads") if use.get(key)]
    frame = [f"a stack frame of {use['frame']} bytes"] if use.get("frame", 0) > FRAMES.get(kernel, 0) else []
    return [f"{kernel} for {architecture}: {what}" for what in spills + frame]


def parse_sass(text):
    """{mangled name: [instruction or "label:"]}, without the padding."""
    kernels, code = {}, None
    for line in text.splitlines():
        if at := re.match(r"\.text\.(\w+):", line):
            code = kernels.setdefault(at[1], [])
        elif at := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            if at[1] != "NOP":
                code.append(at[1])
        elif (at := re.match(r"(\.L_x?_?\w+|\$\w+):", line)) and code is not None:
            code.append(at[1] + ":")
    return kernels


def opcode(instruction):
    return re.sub(r"^@!?U?P\w+ ", "", instruction).split(".")[0].split(" ")[0]


def count(code, *opcodes):
    """How many instructions; of those opcodes, if any are named."""
    return sum(not line.endswith(":") and (not opcodes or opcode(line) in opcodes) for line in code)


def target(instruction):
    """The label that an instruction may jump to, or None. A CALL to a label in the kernel is a far jump."""
    at = re.search(r"\b(?:BRA|CALL)\b.*\(?(\.L_x_\w+)", instruction)
    return at and at[1] + ":"


def shortest(code, first, last, wanted, times):
    """The fewest instructions on a way from `first` to the jump at `last` (places in the code) that pass `times`
    instructions `wanted`: no jump on the way goes back, so a loop within counts once."""
    places = {line: at for at, line in enumerate(code)}
    ways = {first: {0: (0, ())}}  # place -> times passed -> (length, places of the instructions)
    for at in range(first, last):
        line, label = code[at], code[at].endswith(":")
        passed = not label and opcode(line) == wanted
        ends = re.match(r"(BRA|EXIT|RET|CALL\.REL\.NOINC `\(\.L_x)", line)  # without a predicate
        following = [] if ends else [at + 1]
        if target(line) and at < (to := places[target(line)]) <= last:
            following.append(to)
        for done, (length, way) in ways.pop(at, {}).items():
            for to in following:
                key, new = done + passed, (length + (not label), way + ((at,) if not label else ()))
                if key <= times and new < ways.setdefault(to, {}).get(key, (1 << 30,)):
                    ways[to][key] = new
    if times not in ways.get(last, {}):
        raise ValueError(f"no way through the code passes {times} {wanted}")
    return [code[at] for at in (*ways[last][times][1], last)]


def tile_parts(code):
    """The instructions of a tiles_kernel that a thread issues: to begin the accumulators, for one stage of the
    product, and after it if no value of the tile is a new best."""
    product = [at for at, line in enumerate(code) if opcode(line) == "HMMA"]
    back = {at: code.index(target(line)) for at, line in enumerate(code) if target(line)}  # place -> of its label
    loops = [(at, to) for at, to in back.items() if to < product[0] and at > product[-1]] if product else []
    if not loops:
        raise ValueError("no loop holds all HMMA")
    end, begin = min(loops)
    barrier = max((at for at in range(begin) if opcode(code[at]) == "BAR"), default=-1)
    # The next jump to in front of the barrier begins the next tile.
    done = min((at for at, to in back.items() if at > end and to < barrier), default=len(code) - 1)
    return (
        [line for line in code[barrier + 1 : begin] if not line.endswith(":")],
        shortest(code, begin, end, "LDGSTS", COPIES),
        shortest(code, end + 1, done, "FMNMX", MAXIMA),
        any(begin <= to < at < end for at, to in back.items()),  # whether there are loops within the stage
    )


# --- compiling ------------------------------------------------------------------------------------------------------


def run(*command, text=None):
    return subprocess.run([*map(str, command)], input=text, capture_output=True, text=True, check=False)


def version_of(path):
    return re.search(r"\bV([\d.]+)", run(path, "--version").stdout)[1]


def number(version):
    return [int(part) for part in version.split(".")]


def compile_kernels(nvcc, source, architecture, folder):
    """What nvcc said, and the path of the machine code if that was no error and no warning."""
    folder = Path(folder, f"{source.stem}-{architecture}")
    folder.mkdir()
    keep = ["--keep", "--keep-dir", folder, "-o", folder / "object"]
    done = run(nvcc, "-c", source, f"-arch={architecture}", *FLAGS.split(), *keep)
    said = done.stdout + done.stderr
    well = done.returncode == 0 and "warning" not in said.lower()
    return said, next(folder.glob("*.cubin")) if well else None


def find_nvdisasm(nvcc_version):
    """One that knows what this nvcc writes: in PATH, or what a Python package brought along."""
    packages = [Path(path) for path in sys.path if path] + [*ROOT.glob(".venv*/lib/python3*/site-packages")]
    brought = [path for each in packages for path in each.glob("nvidia/cu*/bin") if path.is_dir()]
    brought += [each / "triton" / "backends" / "nvidia" / "bin" for each in packages]
    for folder in [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin", *brought]:
        path = shutil.which("nvdisasm", path=str(folder))
        if path and number(version_of(path))[:2] >= number(nvcc_version)[:2]:
            return path
    raise Missing(
        f"The table can't be made without an nvdisasm of CUDA {nvcc_version} or later, which is in the CUDA toolkit and"
        " in PyPI's nvidia-cuda-nvdisasm; no warning and no spill was found."
    )


def readable(names):
    """{mangled: short}, as in tiles_kernel<BFloat16>."""
    enums = {}
    for header in [ROOT / "csrc" / "triplet.h", *sorted((ROOT / "csrc" / "cuda").glob("*.h"))]:
        for name, values in re.findall(r"enum class (\w+)[^{;]*{([^}]*)}", header.read_text()):
            enums[name] = re.findall(r"\w+", values)
    if shutil.which("c++filt") is None:
        raise Missing("c++filt, which is in binutils, is not in PATH.")
    short = {}
    for mangled, name in zip(names, run("c++filt", text="\n".join(names)).stdout.splitlines()):
        name = re.sub(r"\(triplet_ext::(\w+)\)(\d+)", lambda at: enums[at[1]][int(at[2])], name)
        name = re.sub(r"\w+::|\(anonymous namespace\)::|__nv_|__(?=half)", "", name)
        short[mangled] = re.sub(r"^.*?(\w+(?:<[^()]*>)?)\(.*$", r"\1", name)
    return short


# --- the page -------------------------------------------------------------------------------------------------------


def kernel_table(kernels):
    lines = ["| kernel | " + " | ".join(f"{a}: registers | instructions" for a in ARCHITECTURES) + " |"]
    lines.append("| --- |" + " ---: |" * 2 * len(ARCHITECTURES))
    for name in sorted({name for name, _ in kernels}):
        cells = [f"`{name}`"]
        for architecture in ARCHITECTURES:
            use, code = kernels[name, architecture]
            static = f" ({use['shared']} bytes of static shared memory)" if use["shared"] else ""
            cells += [f"{use['registers']}{static}", str(count(code))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tile_tables(kernels):
    product = ["| kernel | | HMMA | others | others per HMMA |", "| --- | --- |" + " ---: |" * 3]
    values = ["| kernel | | FADD, FFMA | FMNMX | FSETP | LDS | sum per element | at half rate | all per element |"]
    values.append("| --- | --- |" + " ---: |" * 7)
    for (name, architecture), (_, code) in sorted(kernels.items()):
        if not name.startswith("tiles_kernel"):
            continue
        title = f"| `{name}` | {architecture} |"
        try:
            begin, stage, end, loops = tile_parts(code)
        except ValueError as why:
            raise ValueError(f"{name} for {architecture}: {why}; tests/cuda_check.py must follow csrc/cuda") from None
        multiplies, others = count(stage, "HMMA"), count(stage) - count(stage, "HMMA")
        least = "≥ " if loops else ""
        product.append(f"{title} {multiplies} | {least}{others} | {least}{others / multiplies:.2f} |")
        sums, maxima, compares = count(begin, "FADD", "FFMA"), count(end, "FMNMX"), count(end, "FSETP")
        loads = [count(part, "LDS") for part in (begin, end)]
        each = (sums + maxima + compares + sum(loads)) / ELEMENTS
        half, issued = (maxima + compares) / ELEMENTS, (count(begin) + count(end)) / ELEMENTS
        counts = f"{sums} | {maxima} | {compares} | {loads[0]} + {loads[1]}"
        values.append(f"{title} {counts} | {each:.2f} | {half:.2f} | {issued:.2f} |")
    return "\n".join(product), "\n".join(values)


def distance_loop(code):
    """The instructions of the loop that adds squared differences up, for eight features of 4 x 4 pairs."""
    places = {line: at for at, line in enumerate(code) if line.endswith(":")}
    loops = []
    for at, line in enumerate(code):
        if target(line) in places and (begin := places[target(line)]) < at:
            body = code[begin : at + 1]
            if count(body, "BAR") == 0 and count(body, "LDS") and count(body, "FFMA") == count(body, "FADD") == 128:
                loops.append(body)
    if not loops:
        raise ValueError("no loop has 128 FFMA and 128 FADD")
    return min(loops, key=count)


def strategy_table(kernels):
    lines = ["| kernel | | FADD, FFMA | LDS | others |", "| --- | --- |" + " ---: |" * 3]
    for (name, architecture), (_, code) in sorted(kernels.items()):
        if not re.fullmatch(r"mined(_backward)?_kernel<float, \w+>", name):
            continue
        try:
            loop = distance_loop(code)
        except ValueError as why:
            raise ValueError(f"{name} for {architecture}: {why}; tests/cuda_check.py must follow csrc/cuda") from None
        sums, loads = count(loop, "FADD", "FFMA"), count(loop, "LDS")
        lines.append(f"| `{name}` | {architecture} | {sums} | {loads} | {count(loop) - sums - loads} |")
    return "\n".join(lines)


# Of an H100: float32 operations of a lane a second. What the strategies need of them.
LANES = 132 * 128 * 1.755e9
OPERATIONS = {
    "distances, in either pass": "2*B*B*D",
    "batch-all backward: S times the rows": "B*B*D",
    "thresholds, forward": "6*B*B*(K - 1)",
    "thresholds, backward": "2*2*B*B*(K - 1)",
}


def operation_table():
    sizes = ((4096, 128), (32768, 128))
    lines = ["| | operations | " + " | ".join(f"{rows} x {width}" for rows, width in sizes) + " |"]
    lines.append("| --- | --- | ---: | ---: |")
    for what, formula in OPERATIONS.items():
        cells = [f"{1e3 * eval(formula, {}, {'B': b, 'D': d, 'K': 4}) / LANES:.2f} ms" for b, d in sizes]
        lines.append(f"| {what} | `{formula}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What a step moves and the least that it could: every input read once, every output written once. T = B triplets of
# D elements of s bytes; P bytes of a packed row; n x n tiles; K rows a class.
BYTES = {
    "explicit forward": ("3*T*D*s + 2*T*4 + 2*T/8*40", "3*T*D*s + 2*T*4 + 4"),
    "explicit backward": ("3*T*D*s + 3*T*D*s + 2*T*4", "3*T*D*s + 3*T*D*s + 2*T*4"),
    "selection: sample": ("64*D*s", "0"),
    "selection: pack": ("B*D*s + B*P + B*(16 + 13)", "B*D*s + B*P"),
    "selection: tiles, from L2": ("n*(n+1)/2 * (2*128*P + 8192)", "B*P"),
    "selection: indices": ("B*(16 + 8 + 16 + 16)", "B*16"),
    "selected forward": ("3*B*D*s + B*16 + 2*B*4 + 2*B/8*40", "B*D*s + B*16 + 2*B*4 + 4"),
    "selected backward": ("(1 + 4)*B*D*s + B*D*s + B*(3*24 + 2*(4 + 8) + 2*4)", "2*B*D*s + B*16 + 2*B*4"),
    "strategies: rows": ("B*D*s + B*(1 + 3*8 + 17)", "B*D*s"),
    "batch-all forward, from L2": ("B/32 * (B + 32)*D*s + B*(2*4*K + 16 + 8)", "B*D*s + B*8 + 4"),
    "batch-all backward, from L2": ("B/32 * ((2*B + 32)*D*s + B*(4*K + 16 + 4)) + B*D*s", "2*B*D*s + B*8"),
    "semi-hard backward, from L2": ("B/32*8 * B*4*K + 4*2*B*(K - 1)*D*s + B*D*s", "2*B*D*s + B*8"),
}
SIZES = ((32768, 128), (32768, 512))


def byte_table():
    title = " | ".join(f"{rows} x {width}" for rows, width in SIZES)
    lines = [f"| step | bytes moved | floor | {title} |", "| --- | --- | --- | ---: | ---: |"]
    for step, formulas in BYTES.items():
        cells = []
        for rows, width in SIZES:
            known = {"T": rows, "B": rows, "D": width, "s": 2, "K": 4}
            known |= {"P": math.ceil(width * 2 / 64) * 64, "n": math.ceil(rows / 128)}
            moved, floor = (eval(formula, {}, known) / 1e6 for formula in formulas)
            cells.append(f"{moved:.2f} MB" + (f", {moved / floor:.2f} x floor" if floor else ""))
        lines.append(f"| {step} | `{formulas[0]}` | `{formulas[1]}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill(page, version, tables):
    """The page with that release and these tables in their places."""
    page = re.sub(r"nvcc [\d.]+\d", f"nvcc {version}", page)
    for name, table in tables.items():
        begin, end = f"<!-- {name}: by tests/cuda_check.py -->\n", "<!-- end -->"
        before, _, rest = page.partition(begin)
        page = before + begin + table + "\n" + end + rest.partition(end)[2]
    return page


def main(write):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Missing("nvcc, which is in the CUDA toolkit, is not in PATH: no kernel was checked.")
    version = version_of(nvcc)
    jobs = [(source, a) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compile_kernels(nvcc, *job, folder), jobs))
        uses = [parse_ptxas(said) for said, _ in results]
        names = readable(sorted({name for use in uses for name in use}))
        wrong = []
        for (source, architecture), (said, cubin), use in zip(jobs, results, uses):
            if cubin is None:
                said = re.sub(r"(?m)^(ptxas info| +\d+ bytes stack frame).*\n", "", said)
                wrong.append(f"{source.name} for {architecture}: errors or warnings\n{said}")
            wrong += [fault for name in use for fault in faults(names[name], architecture, use[name])]
        if wrong:
            print(*wrong, sep="\n")
            return 1
        print(f"{len(jobs)} compilations by nvcc {version}: no warning, no spill, no local memory.", flush=True)

        page = PAGE.read_text()
        before = re.search(r"nvcc ([\d.]+\d)", page)[1]
        if before != version and not write:
            print(f"docs/kernels.md has the tables of nvcc {before}; they were not compared.")
            return 0
        nvdisasm, kernels = find_nvdisasm(version), {}
        for (_, architecture), (_, cubin), use in zip(jobs, results, uses):
            for name, code in parse_sass(run(nvdisasm, "-c", cubin).stdout).items():
                kernels[names[name], architecture] = use[name], code
    product, values = tile_tables(kernels)
    tables = {"kernels": kernel_table(kernels), "product": product, "values": values, "bytes": byte_table()}
    tables |= {"distances": strategy_table(kernels), "operations": operation_table()}
    new = fill(page, version, tables)
    if write:
        PAGE.write_text(new)
    elif new != page:
        old, fresh = page.splitlines(), new.splitlines()
        print(*difflib.unified_diff(old, fresh, "docs/kernels.md", "as it would be", lineterm=""), sep="\n")
        print("docs/kernels.md is out of date: run python tests/cuda_check.py --write and commit")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main("--write" in sys.argv[1:]))
    except (Missing, ValueError) as why:
        print(why, file=sys.stderr)
        sys.exit(2 if isinstance(why, Missing) else 1)
