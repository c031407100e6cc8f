// A pad to draw on, or to drop a picture on: hands Python a small PNG. It holds no mathematics.
const INVITED = "Draw with the pointer, or drop a picture on the pad.";
const SIDE = 168, LARGEST = 512; // of the pad on the screen, and of a picture that is sent, in pixels

async function png(canvas) {
  const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
  return new DataView(await blob.arrayBuffer());
}

function render({ model, el }) {
  const root = document.createElement("div"), canvas = document.createElement("canvas");
  const side = document.createElement("div"), clear = document.createElement("button");
  const label = document.createElement("label"), file = document.createElement("input"), hint = document.createElement("p");
  root.className = "dc-pad";
  root.dataset.lmSuppressShortcuts = "true"; // keys that are typed here are not the notebook's
  canvas.width = canvas.height = SIDE;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "a pad to draw a digit on with the pointer; pictures can be dropped on it");
  clear.textContent = "Clear";
  clear.className = "jupyter-button widget-button";
  file.type = "file";
  file.accept = "image/png,image/jpeg,image/webp";
  label.append("or choose a picture: ", file);
  hint.textContent = INVITED;
  side.append(hint, label, clear);
  root.append(canvas, side);
  el.append(root);
  const ink = canvas.getContext("2d");
  function wipe() { ink.fillStyle = "black"; ink.fillRect(0, 0, SIDE, SIDE); }
  wipe();
  async function send(picture, name) {
    const data = await png(picture);
    model.set("picture", data);
    model.set("name", name);
    model.set("count", model.get("count") + 1);
    model.save_changes();
  }
  async function take(chosen) {
    if (!chosen) return;
    try {
      const image = await createImageBitmap(chosen);
      const scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
      const small = document.createElement("canvas");
      small.width = Math.max(1, Math.round(image.width * scale));
      small.height = Math.max(1, Math.round(image.height * scale));
      small.getContext("2d").drawImage(image, 0, 0, small.width, small.height);
      wipe();
      const fit = SIDE / Math.max(small.width, small.height), w = fit * small.width, h = fit * small.height;
      ink.drawImage(small, (SIDE - w) / 2, (SIDE - h) / 2, w, h);
      await send(small, chosen.name);
    } catch (reason) {
      hint.textContent = `${chosen.name} is no picture that this browser can read; try a PNG or a JPEG.`;
      return;
    }
  }
  model.on("change:said", () => { hint.textContent = model.get("said"); });
  let last = null;
  const at = event => { const r = canvas.getBoundingClientRect(); return [(event.clientX - r.left) * SIDE / r.width, (event.clientY - r.top) * SIDE / r.height]; };
  canvas.style.touchAction = "none";
  canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); last = at(event); line(last); });
  canvas.addEventListener("pointermove", event => { if (last) line(at(event)); });
  canvas.addEventListener("pointerup", () => { if (last) { last = null; send(canvas, "drawing"); } });
  canvas.addEventListener("pointercancel", () => { last = null; });
  function line(to) {
    ink.strokeStyle = "white"; ink.lineWidth = SIDE / 9; ink.lineCap = "round";
    ink.beginPath(); ink.moveTo(...last); ink.lineTo(...to); ink.stroke();
    last = to;
  }
  clear.addEventListener("click", () => { wipe(); hint.textContent = INVITED; });
  file.addEventListener("change", () => { take(file.files[0]); file.value = ""; }); // so that the same one can be chosen again
  root.addEventListener("dragover", event => event.preventDefault());
  root.addEventListener("drop", event => { event.preventDefault(); event.stopPropagation(); take(event.dataTransfer.files[0]); });
}
export default { render };
