"""Drive JupyterLab in a real browser: serve, open a notebook, run it, and time a slider to the repainted figure."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import symtable
import sys
import time
import urllib.request
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = Path(os.environ.get("DIFFCLASS_NOTEBOOKS") or ROOT / "notebooks")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
HANDLE = ".jp-OutputArea-output .noUi-handle"
FIGURE = re.compile(r"\b(\w+_hero|Stage|Explorer)\(")  # what a cell that shows a live figure calls

# Waits until every code cell has run, or one has failed; resolves with "done" or with the failures.
RUN_STATE = """() => {
  const panel = window.jupyterapp.shell.currentWidget, kernel = panel.sessionContext.session?.kernel;
  const cells = panel.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.getSource().trim());
  const failed = cells.flatMap((c, i) => c.model.outputs.toJSON().filter(o => o.output_type === 'error')
    .map(o => `code cell ${i}: ${o.ename}: ${o.evalue}`));
  if (kernel?.status !== 'idle') return null;
  return failed.length ? failed.join('; ') : cells.every(c => c.model.executionCount) ? 'done' : null;
}"""

# Presses an arrow key on slider handle number `index`; resolves with the milliseconds until something of the same
# output that is not that slider has changed and been painted (`first`), and until nothing changes any more (`last`).
PRESS = """async ([selector, index, timeout]) => {
  const handle = document.querySelectorAll(selector)[index];
  const area = handle.closest('.jp-OutputArea-output'), own = handle.closest('.jupyter-widgets');
  const now = +handle.getAttribute('aria-valuenow'), low = +handle.getAttribute('aria-valuemin');
  const high = +handle.getAttribute('aria-valuemax');
  if (now <= low) area.dataset.goes = 'up';
  if (now >= high) area.dataset.goes = 'down';
  const up = area.dataset.goes !== 'down';
  area.dataset.goes = up ? 'down' : 'up';
  // What is put into a canvas is compared as it is put: reading canvases back took 15 ms of every press.
  const put = CanvasRenderingContext2D.prototype.putImageData;
  if (!put.watched) {
    const seen = new WeakMap();
    window.painted = new Set();
    CanvasRenderingContext2D.prototype.putImageData = function (image, ...place) {
      const now = image.data.join();
      if (seen.get(this.canvas) !== now) { seen.set(this.canvas, now); window.painted.add(this.canvas); }
      return put.call(this, image, ...place);
    };
    CanvasRenderingContext2D.prototype.putImageData.watched = true;
  }
  const frame = () => new Promise(r => requestAnimationFrame(r));
  let touched = [];
  const ours = m => m.target === area || own.contains(m.target);
  const observer = new MutationObserver(list => touched.push(...list.filter(m => !ours(m))));
  observer.observe(area, {subtree: true, attributes: true, characterData: true, childList: true});
  handle.scrollIntoView({block: 'nearest'});
  handle.focus();
  await frame(); await frame();
  touched = [];
  window.painted.clear();
  let first = null, last = 0;
  const start = performance.now();
  const key = {key: up ? 'ArrowRight' : 'ArrowLeft', keyCode: up ? 39 : 37, bubbles: true, cancelable: true};
  handle.dispatchEvent(new KeyboardEvent('keydown', {...key, code: key.key}));
  let frames = 0;
  while (performance.now() - start < timeout && (first === null || performance.now() - start - last < 150)) {
    await frame();
    frames += 1;
    const changed = touched, painted = [...window.painted].filter(canvas => area.contains(canvas));
    if (!changed.length && !painted.length) continue;
    touched = [];
    window.painted.clear();
    const pictures = changed.map(m => m.target).filter(n => n.tagName === 'IMG' && n.src);
    if (pictures.length) { await Promise.all(pictures.map(n => n.decode().catch(() => 0))); await frame(); }
    await frame();  // this frame's drawing was painted before the next one begins
    last = performance.now() - start;
    first ??= last;
  }
  observer.disconnect();
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel;
  const state = `${frames} frames painted, slider from ${now} to ${handle.getAttribute('aria-valuenow')}, ` +
    `in the page: ${handle.isConnected}, kernel ${kernel?.status} and ${kernel?.connectionStatus}`;
  return {first, last, state};
}"""


# What is wrong with how the visible stages stand on the page, in words; nothing where each panel is whole.
FAULTS = """() => {
  const view = document.querySelector('.jp-WindowedPanel-outer'), width = view.getBoundingClientRect(), faults = [];
  const meet = (a, b, by) => a.left < b.right - 2 && b.left < a.right - 2 && a.top < b.bottom - by && b.top < a.bottom - by;
  const words_at = text => { const all = document.createRange(); all.selectNodeContents(text); return all.getBoundingClientRect(); };
  const out = (a, b, by) => a.left < b.left - by || a.right > b.right + by || a.top < b.top - by || a.bottom > b.bottom + by;
  if (view.scrollWidth > view.clientWidth + 1) faults.push('the page scrolls sideways');
  [...document.querySelectorAll('.dc-stage')].filter(stage => stage.getClientRects().length).forEach((stage, number) => {
    const hero = stage.closest('.dc-hero') ?? stage, name = `stage ${number}`;
    const panels = [...stage.querySelectorAll('.dc-panel')].map(panel => [panel, panel.getBoundingClientRect()]);
    if (innerWidth > 900 && hero.offsetHeight > view.clientHeight)
      faults.push(`${name} is ${hero.offsetHeight} px tall, the view ${view.clientHeight}`);
    for (const row of stage.querySelectorAll('.dc-row')) {
      const last = row.lastElementChild?.getBoundingClientRect(), whole = stage.getBoundingClientRect();
      if (last && last.right < whole.right - 2) faults.push(`${name}: a row ends ${whole.right - last.right} px before the stage`);
    }
    panels.forEach(([panel, box], i) => {
      if (box.left < width.left || box.right > width.right) faults.push(`${name}: panel ${i} leaves the view`);
      panels.slice(i + 1).forEach(([, other], j) => { if (meet(box, other, 1)) faults.push(`${name}: panels ${i} and ${i + 1 + j} overlap`); });
      const texts = [...panel.querySelectorAll('text, figcaption, span')].map(text => [text.textContent, text.tagName === 'text' ? text.getBoundingClientRect() : words_at(text)]).filter(([, at]) => at.width);
      texts.forEach(([words, at], k) => {
        if (out(at, box, 3)) faults.push(`${name}: "${words}" leaves panel ${i}`);
        texts.slice(k + 1).forEach(([more, there]) => { if (meet(at, there, 5)) faults.push(`${name}: "${words}" lies on "${more}"`); });
      });
    });
    for (const control of hero.querySelectorAll('.dc-controls button, .dc-controls .noUi-handle'))
      if (!(control.getAttribute('aria-label') || control.textContent.trim())) faults.push(`${name}: a control without a name`);
    for (const canvas of stage.querySelectorAll('canvas'))
      if (!canvas.getAttribute('aria-label') && !canvas.closest('[aria-hidden=true]')) faults.push(`${name}: a canvas without a name`);
    for (const button of hero.querySelectorAll('.dc-controls button')) {
      const at = button.getBoundingClientRect(), row = button.closest('.dc-together') ?? button.closest('.dc-controls');
      const beside = [...row.querySelectorAll('.jupyter-widgets')].some(other => other !== button && Math.abs(other.getBoundingClientRect().top - at.top) < 12);
      if (at.width && !beside) faults.push(`${name}: "${button.textContent}" stands on a line of its own`);
    }
  });
  return faults;
}"""
SIZES = (
    (1280, 720),
    (1140, 900),
    (1920, 1080),
    (820, 1180),
)  # the second: 1440 less an open sidebar


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address and the folder it serves, which holds notebooks/ and assets/."""

    url: str
    folder: Path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen, seconds: float = 60) -> None:
    """Return when `url` answers; raise when the server ends or does not answer in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(
                f"expected a running JupyterLab, but it ended with code {server.returncode}."
            )
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise TimeoutError(f"expected an answer from {url} within {seconds:.0f} s, got none.")


def end(server: subprocess.Popen) -> None:
    """End a server, by force if it does not go by itself."""
    server.terminate()
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        server.kill()


def copy_course(folder: Path) -> None:
    """Copy the notebooks and their pictures to `folder`, and write JupyterLab's settings beside them."""
    shutil.copytree(
        NOTEBOOKS,
        folder / "root" / "notebooks",
        ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
    )
    if (ROOT / "assets").is_dir():
        shutil.copytree(ROOT / "assets", folder / "root" / "assets")
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, value in settings.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))


@dataclass
class Names:
    """What a cell does with names of the notebook: imports, reads, may change, and binds whatever they were before."""

    imported: set[str]
    read: set[str]
    changed: set[str]
    bound: Set[str]

    @classmethod
    def of(cls, source: str) -> "Names":
        """The names of a cell's source."""
        scope = symtable.symtable(source, "cell", "exec")
        assigned = {one.get_name() for one in scope.get_symbols() if one.is_assigned()}
        mutated = set()  # rows[0] = row, rows.append(row)
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
                mutated |= base_of(node)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                if isinstance(node.value.func, ast.Attribute):
                    mutated |= base_of(node.value.func)
        imported = {one.get_name() for one in scope.get_symbols() if one.is_imported()}
        read, bound = read_before_bound(tree.body, frozenset())
        return cls(imported, read, assigned | mutated, bound)


def read_before_bound(
    statements: list[ast.stmt], bound: Set[str]
) -> tuple[set[str], frozenset[str]]:
    """The names that statements read from before them, where `bound` are known, and what is bound after them in any case.

    Why         a loop may run no time, so what it binds counts inside it alone; a branch or a `try` binds nothing for sure
    """
    read = set()
    bound = frozenset(bound)
    for one in statements:
        if isinstance(one, ast.For):
            read |= read_in(one.iter) - bound
            inside = bound | stored_in(one.target)
            for body in (one.body, one.orelse):
                read |= read_before_bound(body, inside)[0]
        elif isinstance(one, ast.With):
            for item in one.items:
                read |= read_in(item.context_expr) - bound
                bound |= stored_in(item.optional_vars) if item.optional_vars else set()
            more, bound = read_before_bound(one.body, bound)
            read |= more
        else:
            read |= read_in(one) - bound
            if isinstance(one, ast.Assign):
                bound |= set().union(*map(stored_in, one.targets))
            elif isinstance(one, ast.FunctionDef | ast.ClassDef):
                bound |= {one.name}
    return read, bound


def stored_in(target: ast.expr) -> set[str]:
    """The names that an assignment to a target binds: those of x and of x, (y, z), none of x[0]."""
    return {
        node.id
        for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def read_in(node: ast.AST) -> set[str]:
    """The names that a piece of a cell, or what is defined inside it, reads from the notebook."""
    return read_by(symtable.symtable(ast.unparse(node), "piece", "exec"))


def read_by(scope: symtable.SymbolTable) -> set[str]:
    """The names of the notebook that a scope and those inside it read."""
    own = scope.get_type() == "module"
    read = {
        one.get_name()
        for one in scope.get_symbols()
        if one.is_referenced() and (own or one.is_global())
    }
    return read.union(*(read_by(child) for child in scope.get_children()))


def base_of(node: ast.expr) -> set[str]:
    """The name that an attribute or an item is of, as a set: none where it is of a literal."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return {node.id} if isinstance(node, ast.Name) else set()


def with_figures_only(path: Path, folder: Path) -> str:
    """Write a notebook's live figures and the cells that these need into a folder; returns the file's name.

    Why         nbval runs every cell of every notebook; what only a browser can tell is about the live figures
    """
    notebook = nbformat.read(path, 4)
    code = [(cell, Names.of(cell.source)) for cell in notebook.cells if cell.cell_type == "code"]
    imported = set().union(*(own.imported for _, own in code))
    kept = []
    needed = set()
    for cell, own in reversed(code):
        # plt.show() changes nothing that is needed
        changed = (own.changed - imported) | own.imported
        if FIGURE.search(cell.source) or changed & needed:
            needed = (needed - own.bound) | own.read
            kept.append(cell)
    notebook.cells = kept[::-1]
    name = f"{path.stem}_figures.ipynb"
    nbformat.write(notebook, folder / name)
    return name


@contextlib.contextmanager
def serve_lab(folder: Path):
    """Serve a copy of the course below `folder` with a JupyterLab that reads no user configuration."""
    copy_course(folder)
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--allow-root",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder / 'root'}",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder / "root",
            env={**os.environ, **{name: str(folder / place) for name, place in places.items()}},
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server)
            yield Lab(f"http://127.0.0.1:{port}", folder / "root")
        finally:
            end(server)


@contextlib.contextmanager
def serve_app(folder: Path):
    """The explorer alone, as `diffclass explore` serves it; yields its address."""
    port = free_port()
    with open(folder / "app.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "diffclass", "explore", "--no-browser", f"--port={port}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "JUPYTER_RUNTIME_DIR": str(folder)},
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/voila/static/voila.js", server)
            yield f"http://127.0.0.1:{port}/"
        finally:
            end(server)


def film(page, hero, label: str, pictures: int, path: Path, width: int = 960) -> None:
    """Drag the slider of a hero from one end to the other, and write what is seen as an animated WebP file."""
    one = hero.locator(".widget-slider:visible", has_text=re.compile(rf"^{re.escape(label)}")).first
    track = one.locator(".noUi-base").bounding_box()
    middle = track["y"] + track["height"] / 2
    one.locator(".noUi-handle").hover()
    page.mouse.down()
    frames = []
    for number in range(pictures):
        page.mouse.move(track["x"] + track["width"] * number / (pictures - 1), middle)
        page.wait_for_timeout(400)
        picture = Image.open(io.BytesIO(hero.screenshot())).convert("RGB")
        frames.append(picture.resize((width, round(picture.height * width / picture.width))))
    page.mouse.up()
    height = max(frame.height for frame in frames)  # a note may take another line
    whole = []
    for frame in frames:
        page_of = Image.new("RGB", (width, height), "white")
        page_of.paste(frame)
        whole.append(page_of)
    lasting = [140] * (len(whole) - 1) + [1200]
    whole[0].save(
        path, save_all=True, append_images=whole[1:], duration=lasting, loop=0, quality=60, method=4
    )


def watched(page):
    """Make a page remember requests to other hosts (`offsite`) and errors in the console (`complaints`)."""
    page.set_default_timeout(60_000)
    page.offsite = []
    page.complaints = []
    here = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:")
    page.on(
        "request",
        lambda request: None if here.match(request.url) else page.offsite.append(request.url),
    )
    page.on(
        "console",
        lambda message: page.complaints.append(message.text) if message.type == "error" else None,
    )
    return page


def open_notebook(page, lab: Lab, name: str) -> None:
    """Open notebooks/`name` in single-document mode and wait for its kernel."""
    page.goto(f"{lab.url}/doc/tree/notebooks/{name}?reset")
    page.wait_for_function("window.jupyterapp !== undefined")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("""() => { const s = window.jupyterapp.shell.currentWidget?.sessionContext;
        return s?.isReady && s.session?.kernel?.status === 'idle'; }""")


def run_all(page, seconds: float = 240) -> str:
    """Run every cell of the open notebook; "done", or what failed in which cell."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    return page.wait_for_function(RUN_STATE, timeout=1000 * seconds).json_value()


def close_notebook(page) -> None:
    """Have the notebook's kernel shut down, so that it takes no processor time from the next measurement."""
    page.evaluate("() => { window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")


def heroes(page) -> list[int]:
    """For every output that holds sliders, the number of its first visible slider handle on the page."""
    return page.evaluate(
        """selector => { const seen = new Set(), found = [];
        document.querySelectorAll(selector).forEach((handle, i) => {
            const area = handle.closest('.jp-OutputArea-output');
            if (handle.getClientRects().length && !seen.has(area)) { seen.add(area); found.push(i); } });
        return found; }""",
        HANDLE,
    )


def press(page, index: int, timeout: float = 10_000) -> tuple[float, float]:
    """Milliseconds from a key press on handle `index` to the first and to the last repaint that it causes."""
    times = page.evaluate(PRESS, [HANDLE, index, timeout])
    if times["first"] is None:
        raise AssertionError(
            f"expected slider {index} to change the figure of its output, but nothing outside the "
            f"slider changed within {timeout / 1000:.1f} s. {times['state']}; console: {page.complaints}."
        )
    return times["first"], times["last"]


def faults(page) -> list[str]:
    """What is wrong with the stages of the open notebook at each of `SIZES`, each fault with its size."""
    found = []
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => setTimeout(() => requestAnimationFrame(done), 100)))"
        )
        found += [f"{width}x{height}: {fault}" for fault in page.evaluate(FAULTS)]
    return found


def quantile(values: list[float], q: float) -> float:
    """The smallest value that at least a share `q` of the values does not exceed."""
    return sorted(values)[max(0, -int(-q * len(values) // 1) - 1)]
