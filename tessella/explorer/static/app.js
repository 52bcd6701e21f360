"use strict";

const $ = (id) => document.getElementById(id);
const state = {
  about: null, shown: null, first: null, second: null, history: [], mode: "pick", layer: 0,
  cell: null, code: null, region: null, hovered: null, map: null,
};

// --- asking ---------------------------------------------------------------------------------------------------------

let waiting = 0;

async function ask(path, body) {
  document.body.classList.toggle("busy", ++waiting > 0);
  try {
    const options = body === undefined ? {} : { method: "POST", body: body instanceof Blob ? body : JSON.stringify(body) };
    const response = await fetch(path, options);
    const answer = await response.json().catch(() => ({ refused: `the server answered ${response.status}` }));
    if (!response.ok) throw new Error(answer.refused || `the server answered ${response.status}`);
    return answer;
  } catch (error) {
    const lost = error instanceof TypeError;
    tell(lost ? "the server does not answer; was it stopped?" : error.message, true);
    throw error;
  } finally {
    document.body.classList.toggle("busy", --waiting > 0);
  }
}

function tell(text, wrong = false) {
  $("message").textContent = text;
  $("message").classList.toggle("wrong", wrong);
}

// A newer request makes the answer to an older one worthless.
function latest(action) {
  let last = 0;
  return async (...parts) => {
    const mine = ++last;
    const answer = await action(...parts).catch(() => null);
    return mine === last ? answer : null;
  };
}

// --- the signal on the bench ------------------------------------------------------------------------------------------

const isPicture = () => state.about.medium === "picture";
const layers = () => state.about.num_codebooks;
const cells = () => state.shown.grid.reduce((a, b) => a * b, 1);
const rowsAndColumns = () => (state.shown.grid.length === 2 ? state.shown.grid : [1, cells()]);

function media(url) {
  if (url.startsWith("data:audio")) {
    const player = Object.assign(new Audio(url), { controls: true });
    return player;
  }
  return Object.assign(new Image(), { src: url, alt: "" });
}

function place(id, url) {
  const frame = $(id);
  frame.querySelectorAll("img, audio").forEach((old) => old.remove());
  if (url) frame.prepend(media(url));
}

function show(answer, { fresh = false } = {}) {
  if (!answer) return;
  state.shown = { ...state.shown, ...answer };
  if (fresh) {
    state.first = { ...answer };
    state.history = [];
    state.region = null;
    state.cell = null;
    place("original", answer.original);
    place("error", answer.error);
    $("error-view").hidden = !answer.error;
    const bits = answer.bits && answer.signal_size ? `, ${answer.bits.toLocaleString()} bits` : "";
    $("grid-size").textContent = `${answer.grid.join(" x ")}${layers() > 1 ? ` x ${layers()}` : ""}${bits}`;
    if (answer.said) tell(answer.said);
  }
  place("decoded", answer.reconstruction);
  const untouched = String(state.shown.tokens) === String(state.first.tokens);
  $("score").textContent = state.first.psnr === undefined || !untouched ? "" : `${state.first.psnr} dB`;
  draw();
  buttons();
}

function open(answer) {
  if (!answer) return;
  tell("");
  state.shown = null;
  show(answer, { fresh: true });
  $("morph").value = 0;
  $("morph-value").textContent = "0 %";
}

function buttons() {
  const there = Boolean(state.shown);
  $("undo").disabled = !state.history.length;
  $("reset").disabled = !there || String(state.shown.tokens) === String(state.first.tokens);
  $("fill-code").disabled = !(there && state.region && state.code !== null);
  $("put").disabled = !(there && state.cell !== null && state.code !== null);
  $("inpaint").disabled = !(there && state.region);
  const pair = there && state.second && String(state.second.grid) === String(state.shown.grid);
  $("morph").disabled = !pair;
  $("splice").disabled = !(pair && state.region);
  $("keep").disabled = !there;
}

const decode = latest((tokens) => ask("/api/decode", { tokens, grid: state.shown.grid, extent: state.first.extent }));

async function change(tokens, { remember = true } = {}) {
  if (remember) state.history.push(state.shown.tokens);
  state.shown.tokens = tokens;
  buttons();
  show(await decode(tokens));
}

function put(places, code) {
  const tokens = state.shown.tokens.slice();
  for (const cell of places) tokens[cell * layers() + state.layer] = code;
  return tokens;
}

function inside(region) {
  const [rows, columns] = rowsAndColumns();
  const found = [];
  for (let row = Math.max(region[0], 0); row <= Math.min(region[1], rows - 1); row++)
    for (let column = Math.max(region[2], 0); column <= Math.min(region[3], columns - 1); column++) found.push(row * columns + column);
  return found;
}

// --- canvases -----------------------------------------------------------------------------------------------------

function canvasIn(id) {
  let canvas = $(id).querySelector("canvas");
  if (!canvas) {
    canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", id === "tokens" ? "Tokens; arrow keys move, Enter chooses" : "Decoded signal");
    if (id !== "tokens") canvas.className = "over";
    $(id).append(canvas);
    listen(canvas);
  }
  return canvas;
}

function draw() {
  const [rows, columns] = rowsAndColumns();
  const along = state.shown.grid.length === 1;
  $("tokens").classList.toggle("along", along);
  const tokens = canvasIn("tokens");
  const scale = Math.max(4, Math.ceil((along ? 640 : 320) / columns));
  tokens.width = columns * scale;
  tokens.height = rows * (along ? 60 : scale);
  const context = tokens.getContext("2d");
  const height = tokens.height / rows;
  for (let cell = 0; cell < rows * columns; cell++) {
    context.fillStyle = `#${state.shown.colours[cell * layers() + state.layer]}`;
    context.fillRect((cell % columns) * scale, Math.floor(cell / columns) * height, scale, height);
  }
  marks(context, scale, height);
  if (isPicture() && !along) {
    const over = canvasIn("decoded");
    over.width = columns * scale;
    over.height = rows * scale;
    marks(over.getContext("2d"), scale, scale);
  }
}

function marks(context, width, height) {
  const [, columns] = rowsAndColumns();
  const box = (row0, row1, column0, column1, colour, line) => {
    const corner = [column0 * width, row0 * height, (column1 - column0 + 1) * width, (row1 - row0 + 1) * height];
    context.lineWidth = line + 2;
    context.strokeStyle = "#000a";
    context.strokeRect(...corner);
    context.lineWidth = line;
    context.strokeStyle = colour;
    context.strokeRect(...corner);
  };
  const one = (cell, colour, line) => {
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    box(row, row, column, column, colour, line);
  };
  if (state.region) box(...state.region, "#ffd34d", 2);
  if (state.cell !== null) one(state.cell, "#ffffff", 2);
  if (state.hovered !== null) one(state.hovered, "#ffffff", 1);
}

function cellAt(canvas, event) {
  const bounds = canvas.getBoundingClientRect();
  const [rows, columns] = rowsAndColumns();
  const limit = (value, most) => Math.min(Math.max(Math.floor(value), 0), most - 1);
  const row = limit(((event.clientY - bounds.top) / bounds.height) * rows, rows);
  const column = limit(((event.clientX - bounds.left) / bounds.width) * columns, columns);
  return { row, column, cell: row * columns + column };
}

function listen(canvas) {
  let start = null;
  let painted = null;
  canvas.addEventListener("pointermove", (event) => {
    if (!state.shown) return;
    const at = cellAt(canvas, event);
    if (painted) painted.add(at.cell);
    if (start) region(start, at);
    if (state.hovered !== at.cell) {
      state.hovered = at.cell;
      hover(at.cell);
      draw();
      if (painted) preview(painted);
    }
  });
  canvas.addEventListener("pointerleave", () => {
    state.hovered = null;
    if (state.shown) draw();
  });
  canvas.addEventListener("pointerdown", (event) => {
    if (!state.shown) return;
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    const at = cellAt(canvas, event);
    if (state.mode === "region") region((start = at), at);
    else if (state.mode === "paint" && state.code !== null) preview((painted = new Set([at.cell])));
    else choose(at.cell);
  });
  const end = () => {
    if (painted) change(put(painted, state.code));
    start = painted = null;
    buttons();
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("keydown", (event) => {
    const [rows, columns] = rowsAndColumns();
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (event.key in steps) {
      event.preventDefault();
      const next = (state.cell ?? 0) + steps[event.key];
      if (next >= 0 && next < rows * columns) choose(next);
    } else if (event.key === "Enter" && state.code !== null && state.cell !== null) change(put([state.cell], state.code));
  });
}

function preview(painted) {
  const context = canvasIn("tokens").getContext("2d");
  const [rows, columns] = rowsAndColumns();
  const [width, height] = [canvasIn("tokens").width / columns, canvasIn("tokens").height / rows];
  context.fillStyle = $("code-colour").style.background;
  for (const cell of painted) context.fillRect((cell % columns) * width, Math.floor(cell / columns) * height, width, height);
}

function region(from, to) {
  state.region = [Math.min(from.row, to.row), Math.max(from.row, to.row), Math.min(from.column, to.column), Math.max(from.column, to.column)];
  draw();
  buttons();
}

function choose(cell) {
  state.cell = cell;
  select(state.shown.tokens[cell * layers() + state.layer]);
  draw();
  buttons();
}

// --- codes ------------------------------------------------------------------------------------------------------------

const known = new Map();
const fetchCode = latest(async (layer, code) => {
  const key = `${layer}/${code}`;
  if (!known.has(key)) known.set(key, await ask(`/api/codes/${key}`));
  return known.get(key);
});

let pause = null;
function hover(cell) {
  clearTimeout(pause);
  if (state.cell !== null && state.mode === "pick") return; // a chosen place keeps its code in view
  const code = state.shown.tokens[cell * layers() + state.layer];
  if (state.mode !== "paint") pause = setTimeout(() => describe(code), 40);
}

async function select(code) {
  state.code = code;
  $("by-hand").value = code;
  buttons();
  await describe(code);
}

async function describe(code) {
  const found = await fetchCode(state.layer, code);
  if (!found) return;
  $("code-body").hidden = false;
  $("code-hint").hidden = true;
  $("code-name").textContent = layers() > 1 ? `codebook ${found.codebook}, code ${found.code}` : `code ${found.code}`;
  $("code-colour").style.background = `#${found.colour}`;
  const counted = state.about.counted;
  $("code-use").textContent = found.count === null ? "" : found.count === 0 ? "never used" : `${((100 * found.count) / counted.positions).toFixed(2)} % of tokens`;
  bars(found.vector, found.dim);
  fillStrip($("patches"), found.patches.map((url) => media(url)));
  codes($("neighbours"), found.neighbours);
  $("siblings-part").hidden = !found.siblings;
  if (found.siblings) codes($("siblings"), found.siblings);
  drawMap(code);
}

function fillStrip(strip, items) {
  strip.replaceChildren(...items);
}

function codes(box, list) {
  const items = list.map((one) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = `distance ${one.distance}${one.count === 0 ? ", never used" : ""}`;
    const face = one.patch ? media(one.patch) : Object.assign(document.createElement("span"), { className: "swatch" });
    if (!one.patch) face.style.background = `#${one.colour}`;
    const distance = Object.assign(document.createElement("small"), { textContent: one.distance.toPrecision(2) });
    button.append(face, String(one.code), distance);
    button.addEventListener("click", () => {
      if (state.shown && state.cell !== null) change(put([state.cell], one.code));
      select(one.code);
    });
    return button;
  });
  const nothing = Object.assign(document.createElement("p"), { className: "hint", textContent: "This codebook is too large to search." });
  box.replaceChildren(...(items.length ? items : [nothing]));
}

function bars(vector, dim) {
  const canvas = $("vector");
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const most = Math.max(...vector.map(Math.abs), 1e-9);
  const ink = getComputedStyle(document.body).color;
  const width = canvas.width / Math.max(vector.length, 1);
  vector.forEach((value, place) => {
    const height = (value / most) * (canvas.height / 2 - 2);
    context.fillStyle = ink;
    context.fillRect(place * width + 0.5, canvas.height / 2 - Math.max(height, 0), Math.max(width - 1, 1), Math.max(Math.abs(height), 0.5));
  });
  canvas.title = dim > vector.length ? `the first ${vector.length} of ${dim} numbers` : vector.join(", ");
}

// --- map --------------------------------------------------------------------------------------------------------------

async function loadMap() {
  try {
    state.map = await ask(`/api/codes/${state.layer}`);
  } catch (error) {
    state.map = null;
    tell("");
    $("map").hidden = true;
    $("map-hint").textContent = error.message;
    return;
  }
  const { codes: shown, num_codes: all, counts } = state.map;
  const part = shown.length < all ? `${shown.length.toLocaleString()} of ${all.toLocaleString()} codes` : `All ${all.toLocaleString()} codes`;
  const spread = state.map.spread ? " Codes that coincide there lie around their place." : "";
  const dead = counts ? " Larger is used more; crosses are never used." : "";
  $("map-hint").textContent = `${part} in the plane of their largest variance.${spread}${dead} Click one to take it.`;
  drawMap(state.code);
}

const mapPlace = (number) => {
  const canvas = $("map");
  return [10 + state.map.x[number] * (canvas.width - 20), 10 + state.map.y[number] * (canvas.height - 20)];
};

function drawMap(marked) {
  if (!state.map) return;
  const canvas = $("map");
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const { codes: shown, counts, colours } = state.map;
  const most = counts ? Math.max(...counts, 1) : 1;
  shown.forEach((code, number) => {
    const [x, y] = mapPlace(number);
    context.fillStyle = context.strokeStyle = `#${colours[number]}`;
    if (counts && counts[number] === 0) {
      context.globalAlpha = 0.6;
      context.beginPath();
      context.moveTo(x - 2, y - 2); context.lineTo(x + 2, y + 2); context.moveTo(x + 2, y - 2); context.lineTo(x - 2, y + 2);
      context.stroke();
      context.globalAlpha = 1;
    } else {
      context.beginPath();
      context.arc(x, y, counts ? 1.5 + 6 * Math.sqrt(counts[number] / most) : 2, 0, 2 * Math.PI);
      context.fill();
    }
  });
  const number = shown.indexOf(marked);
  if (number >= 0) {
    const [x, y] = mapPlace(number);
    context.strokeStyle = getComputedStyle(document.body).color;
    context.lineWidth = 2;
    context.beginPath();
    context.arc(x, y, 9, 0, 2 * Math.PI);
    context.stroke();
    context.lineWidth = 1;
  }
}

$("map").addEventListener("click", (event) => {
  if (!state.map) return;
  const bounds = $("map").getBoundingClientRect();
  const x = ((event.clientX - bounds.left) / bounds.width) * $("map").width;
  const y = ((event.clientY - bounds.top) / bounds.height) * $("map").height;
  let best = [Infinity, 0];
  state.map.codes.forEach((code, number) => {
    const [cx, cy] = mapPlace(number);
    best = Math.min(best[0], Math.hypot(cx - x, cy - y)) < best[0] ? [Math.hypot(cx - x, cy - y), code] : best;
  });
  select(best[1]);
});

// --- two signals --------------------------------------------------------------------------------------------------------

// The same places for the same share, whatever was done before.
function order(count) {
  let seed = 1;
  const random = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const places = [...Array(count).keys()];
  for (let place = count - 1; place > 0; place--) {
    const other = Math.floor(random() * (place + 1));
    [places[place], places[other]] = [places[other], places[place]];
  }
  return places;
}

function mixed(share) {
  const tokens = state.first.tokens.slice();
  const places = order(cells()).slice(0, Math.round(share * cells()));
  for (const cell of places)
    for (let layer = 0; layer < layers(); layer++) tokens[cell * layers() + layer] = state.second.tokens[cell * layers() + layer];
  return tokens;
}

$("keep").addEventListener("click", () => {
  state.second = { ...state.shown };
  place("second-view", state.shown.reconstruction);
  tell("kept; open another signal, then morph or copy");
  buttons();
});
$("morph").addEventListener("input", () => {
  const share = $("morph").value / 100;
  $("morph-value").textContent = `${$("morph").value} %`;
  change(mixed(share), { remember: false });
});
$("splice").addEventListener("click", () => {
  const tokens = state.shown.tokens.slice();
  for (const cell of inside(state.region))
    for (let layer = 0; layer < layers(); layer++) tokens[cell * layers() + layer] = state.second.tokens[cell * layers() + layer];
  change(tokens);
});

// --- tools --------------------------------------------------------------------------------------------------------------

const HINTS = {
  pick: "Click a token, then a code in the list: it is put there. Arrow keys move; Enter puts the code.",
  paint: "Draw over the tokens: they become the code that was looked at last.",
  region: "Drag over tokens to mark a region; fill it with a code, copy into it, or let the generator fill it.",
};

function setMode(mode) {
  state.mode = mode;
  document.querySelectorAll("[data-mode]").forEach((button) => button.setAttribute("aria-checked", String(button.dataset.mode === mode)));
  $("mode-hint").textContent = HINTS[mode];
}

document.querySelectorAll("[data-mode]").forEach((button) => button.addEventListener("click", () => setMode(button.dataset.mode)));
$("undo").addEventListener("click", () => {
  const tokens = state.history.pop();
  if (tokens) change(tokens, { remember: false });
});
$("reset").addEventListener("click", () => change(state.first.tokens.slice()));
$("fill-code").addEventListener("click", () => change(put(inside(state.region), state.code)));
$("put").addEventListener("click", () => change(put([state.cell], state.code)));
$("by-hand").addEventListener("change", () => {
  const code = Number($("by-hand").value);
  if (Number.isInteger(code) && code >= 0 && code < state.about.num_codes) select(code);
  else tell(`codes are from 0 to ${state.about.num_codes - 1}`, true);
});
$("layer").addEventListener("change", () => {
  state.layer = Number($("layer").value);
  if (state.shown) draw();
  loadMap();
});

const settings = () => ({
  label: Number($("class").value || 0), temperature: Number($("temperature").value), guidance: $("guidance").value || "1",
  top_k: $("top-k").value ? Number($("top-k").value) : null, seed: Number($("seed").value || 0),
});

$("sample").addEventListener("click", async () => {
  const answer = await ask("/api/sample", settings()).catch(() => null);
  if (answer) open({ ...answer, original: null, error: null });
});
$("inpaint").addEventListener("click", async () => {
  const own = state.shown.grid.length === 2 ? state.region : state.region.slice(2);
  const asked = { tokens: state.shown.tokens, grid: state.shown.grid, region: own, ...settings() };
  const answer = await ask("/api/fill", asked).catch(() => null);
  if (answer) {
    state.history.push(state.shown.tokens);
    show(answer);
  }
});

// --- opening ------------------------------------------------------------------------------------------------------------

async function openFile(file) {
  if (file) open(await ask(`/api/open?name=${encodeURIComponent(file.name)}`, file).catch(() => null));
}

$("file").addEventListener("change", () => openFile($("file").files[0]));
for (const kind of ["dragenter", "dragover"])
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
for (const kind of ["dragleave", "drop"])
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => openFile(event.dataTransfer.files[0]));

async function openExample(number, button) {
  document.querySelectorAll("#examples button").forEach((other) => other.setAttribute("aria-current", String(other === button)));
  open(await ask(`/api/examples/${number}`).catch(() => null));
}

async function begin() {
  const about = (state.about = await ask("/api/about"));
  document.title = $("title").textContent = about.title;
  const usage = about.usage === null ? "" : `, ${(100 * about.usage).toFixed(1)} % used by ${about.counted.signals.toLocaleString()} signals`;
  const books = about.num_codebooks > 1 ? `${about.num_codebooks} codebooks of ` : "";
  $("facts").textContent = `${books}${about.num_codes.toLocaleString()} codes${usage}; one token for ${about.stride}${about.medium === "picture" ? ` x ${about.stride} px` : " samples"}; ${(about.parameters / 1e6).toFixed(2)} M parameters`;
  $("layer-field").hidden = about.num_codebooks === 1;
  $("layer").replaceChildren(...[...Array(about.num_codebooks).keys()].map((k) => new Option(String(k), String(k))));
  $("by-hand").max = about.num_codes - 1;
  $("error-view").hidden = about.medium !== "picture";
  const thumbnails = about.examples.map((number) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-label", `example ${number}`);
    button.append(Object.assign(new Image(), { src: `/api/examples/${number}.png`, alt: "" }));
    button.addEventListener("click", () => openExample(number, button));
    return button;
  });
  $("examples").replaceChildren(...thumbnails);
  if (about.generator) {
    $("generator").hidden = false;
    const { classes, kind } = about.generator;
    $("class-field").hidden = !classes;
    if (classes) $("class").replaceChildren(...classes.map((name, label) => new Option(name, String(label))));
    $("order-hint").textContent = kind === "MaskGIT" ? "All that stays is seen." : "What comes before in reading order is seen.";
  }
  setMode("pick");
  buttons();
  if (thumbnails.length) await openExample(about.examples[0], thumbnails[0]);
  await loadMap();
}

begin().catch(() => null);
