// Asks the server twice a second what it holds, draws it, and sends what the user asks for.
const POLL = 500, PACE_POINTS = 240;
const $ = (id) => document.getElementById(id);
let moves = -1, lastDecision = 0, dragging = false, asking = null, pace = [], rungs = new Map();
const history = [];

const size = (bytes) =>
  bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB`
    : bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 1024).toFixed(1)} KiB`;

async function api(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.status === 401) $("key-form").hidden = false;
  if (!reply.ok) {
    const body = await reply.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${reply.status}`);
  }
  return reply;
}

function part(kind, words, bytes, total) {
  const piece = document.createElement("div"), item = document.createElement("li");
  piece.className = kind;
  piece.style.width = `${(100 * bytes) / total}%`;
  piece.title = `${words} ${size(bytes)}`;
  const mark = document.createElement("i");
  mark.className = kind;
  item.append(mark, `${words} ${size(bytes)}`);
  return [piece, item];
}

function drawBudget(now) {
  const total = now.memory ?? now.planned, pages = Object.entries(now.pages).reverse();
  const parts = [["weights", "weights", now.weights]];
  const units = pages.reduce((sum, [bits, count]) => sum + bits * count, 0);
  for (const [bits, count] of pages)
    parts.push([`p${bits}`, `${count} pages of ${bits} bits`, (now.cache * bits * count) / units]);
  if (!pages.length && now.cache) parts.push(["p16", "KV cache", now.cache]);
  parts.push(["activations", "activations", now.activations], ["free", "free", now.free]);
  const drawn = parts.map((one) => part(...one, total));
  $("bar").replaceChildren(...drawn.map(([piece]) => piece));
  $("bar").setAttribute("aria-label", parts.map(([, words, bytes]) => `${words} ${size(bytes)}`).join(", "));
  $("legend").replaceChildren(...drawn.map(([, item]) => item));
  $("total").textContent = size(total);
  const slider = $("slider");
  slider.min = now.least, slider.max = Math.max(now.most, total, now.least + 1);
  slider.step = Math.max(1, Math.floor((slider.max - slider.min) / 200));
  slider.disabled = now.memory === null;
  if (!dragging && document.activeElement !== $("size")) {
    slider.value = total;
    $("size").value = `${(total / 2 ** 20).toFixed(1)}MiB`;
  }
}

function drawNow(now) {
  $("speed").textContent = now.tokens_per_second.toFixed(1);
  $("running").textContent = now.running;
  $("waiting").textContent = now.waiting;
  const cache = now.cache_damage ? ` + ${now.cache_damage.toFixed(4)} cache` : "";
  $("damage").textContent = now.damage === null ? "?" : now.damage.toFixed(4) + cache;
  pace = [...pace, now.tokens_per_second].slice(-PACE_POINTS);
  const top = Math.max(1, ...pace);
  const points = pace.map((value, i) => `${240 - (pace.length - 1 - i)},${38 - (36 * value) / top}`);
  $("pace").firstElementChild.setAttribute("points", points.join(" "));
}

async function drawLadder() {
  const rows = new Map();
  for (const target of await (await api("/v1/ladder")).json()) {
    const own = target.name.replace(/\.weight$/, "").split(".").pop();
    const kind = target.layer === null ? target.kind : own;
    if (!rows.has(kind)) rows.set(kind, []);
    rows.get(kind).push(target);
  }
  const drawn = [...rows].map(([kind, targets]) => {
    const row = document.createElement("div"), name = document.createElement("div");
    const cells = document.createElement("div");
    row.className = "row", name.className = "name", cells.className = "cells";
    name.textContent = name.title = kind;
    for (const target of targets) {
      const cell = document.createElement("span");
      cell.style.opacity = 0.12 + (0.88 * target.nbytes) / target.most;
      cell.title = `${target.name}: rung ${target.rung + 1} of ${target.rungs}, ${size(target.nbytes)}`;
      if (rungs.has(target.name) && rungs.get(target.name) !== target.rung) cell.className = "moved";
      rungs.set(target.name, target.rung);
      cells.append(cell);
    }
    row.append(name, cells);
    return row;
  });
  $("ladder").replaceChildren(...drawn);
}

async function drawDecisions() {
  for (const made of await (await api(`/v1/decisions?since=${lastDecision}`)).json()) {
    const item = document.createElement("li"), time = document.createElement("time");
    time.textContent = new Date(made.at * 1000).toLocaleTimeString();
    item.append(time, `${made.what}: ${made.reason}`);
    $("log").prepend(item);
    lastDecision = made.id;
  }
}

async function look() {
  if (document.hidden) return;
  try {
    const now = await (await api("/v1/budget")).json();
    drawBudget(now);
    drawNow(now);
    await drawDecisions();
    if (now.moves !== moves || now.memory === null) {
      moves = now.moves;
      await drawLadder();
    }
    $("trouble").textContent = "";
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

async function setBudget(memory) {
  $("budget-words").textContent = "moving ...";
  try {
    const began = performance.now();
    await api("/v1/budget", { method: "PUT", body: JSON.stringify({ memory }) });
    $("budget-words").textContent = `moved in ${Math.round(performance.now() - began)} ms`;
  } catch (error) {
    $("budget-words").textContent = error.message;
  }
  moves = -1;
  await look();
}

async function send(text) {
  const talk = (role, words) => {
    const said = document.createElement("p");
    said.className = role, said.textContent = words;
    $("talk").append(said);
    return said;
  };
  history.push({ role: "user", content: text });
  talk("user", text);
  const said = talk("assistant", "");
  asking = new AbortController();
  try {
    const body = JSON.stringify({ messages: history, stream: true, max_tokens: 512, temperature: 0.7 });
    const reply = await api("/v1/chat/completions", { method: "POST", body, signal: asking.signal });
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        said.textContent += event.choices[0]?.delta?.content ?? "";
      }
      $("talk").scrollTop = $("talk").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") said.textContent += ` [${error.message}]`;
  }
  history.push({ role: "assistant", content: said.textContent });
  asking = null;
}

const slider = $("slider");
let wanted = 0;
slider.addEventListener("input", () => {
  dragging = true;
  $("size").value = `${(slider.value / 2 ** 20).toFixed(1)}MiB`;
  clearTimeout(wanted);
  wanted = setTimeout(() => { dragging = false; setBudget(Number(slider.value)); }, 300);
});
$("budget").addEventListener("submit", (event) => { event.preventDefault(); setBudget($("size").value); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
  begin();
});
$("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("say").value.trim();
  if (text && !asking) { $("say").value = ""; send(text); }
});
$("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("chat").requestSubmit(); }
});
addEventListener("keydown", (event) => { if (event.key === "Escape") asking?.abort(); });
addEventListener("pagehide", () => asking?.abort());
addEventListener("visibilitychange", look);

async function begin() {
  try {
    $("model").textContent = (await (await api("/v1/models")).json()).data[0].id;
  } catch { /* look() tells */ }
  moves = -1;
  look();
}
begin();
setInterval(look, POLL);
