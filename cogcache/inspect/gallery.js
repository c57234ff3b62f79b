"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const bytes = (count) => {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return (unit === "B" ? count : count.toFixed(1)) + " " + unit;
    count /= 1000;
  }
  return count.toFixed(1) + " TB";
};

/* Clips and failures are one list. */
const items = report.samples.map((clip) => ({ ...clip, text: clip.caption }));
for (const row of report.failures) items.push({ ...row, text: row.reason, flags: ["failed"], failed: true, bucket: "" });
for (const item of items) item.haystack = (item.text + "\n" + item.source + "\n" + item.id + "\n" + item.window).toLowerCase();

function head() {
  const name = report.root.split("/").filter(Boolean).pop() || report.root;
  $("name").textContent = name;
  document.title = name + " - cogcache";
  $("model").textContent = report.model.id;
  const add = (title, value, note) => {
    const box = make("div");
    const dd = make("dd", value);
    if (note) dd.append(make("small", note));
    box.append(make("dt", title), dd);
    $("numbers").append(box);
  };
  const kinds = (counts) => Object.entries(counts).map(([name, count]) => count + " " + name).join(", ");
  add("Clips", report.clips.toLocaleString("en"), report.failed ? report.failed + " failed" : "none failed");
  for (const [name, series] of Object.entries(report.series)) add(name, bytes(series.bytes), series.entries + " entries in " + series.shards + " shards");
  add("Captions", report.captions.unique.toLocaleString("en"), report.captions.duplicates + " clips share one, longest " + report.captions.longest_words + " words");
  if (report.durations) add("Duration", report.durations.median.toFixed(2) + " s", report.durations.shortest.toFixed(2) + " to " + report.durations.longest.toFixed(2) + " s");
  if (report.latents) add("Latent mean", report.latents.mean.toFixed(3), "spread " + report.latents.std.toFixed(3) + ", " + report.outliers.length + " outliers");
  add("Read by", Object.keys(report.readers).length ? Object.keys(report.readers).join(", ") : "-", kinds(report.codecs));
  table($("fingerprints"), "Cache", [["fingerprint", report.fingerprint], ["folder", report.root], ...Object.entries(report.model.variant)]);
  for (const [name, series] of Object.entries(report.series)) table($("fingerprints"), name, Object.entries(series.fingerprint));
  table($("reasons"), "", Object.entries(report.reasons).map(([reason, count]) => [count + " x", reason]));
  $("failures").hidden = !report.failed;
}

function table(parent, title, rows) {
  const node = make("table");
  if (title) node.append(make("caption", title));
  for (const [name, value] of rows) {
    const row = make("tr");
    const th = make("th", name);
    th.scope = "row";
    row.append(th, make("td", value === null ? "-" : String(value)));
    node.append(row);
  }
  parent.append(node);
}

/* Search, filters, order. */
const chosen = new Set();
let shown = items;

function controls() {
  const counts = new Map();
  for (const item of items) for (const flag of item.flags) counts.set(flag, (counts.get(flag) || 0) + 1);
  for (const [flag, count] of counts) {
    const button = make("button", flag + " " + count);
    button.type = "button";
    button.dataset.flag = flag;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const on = !chosen.delete(flag);
      if (on) chosen.add(flag);
      button.setAttribute("aria-pressed", String(on));
      update();
    });
    $("flags").append(button);
  }
  $("bucket").append(new Option("All buckets", ""));
  for (const [name, count] of Object.entries(report.buckets)) $("bucket").append(new Option(name + " (" + count + ")", name));
  for (const [name, title] of [["source", "By file"], ["score", "Most unusual first"], ["mean", "By latent mean"], ["std", "By latent spread"], ["longest", "Longest caption first"], ["caption", "By caption"], ["seconds", "Longest first"]]) {
    if (["score", "mean", "std"].includes(name) && !report.latents) continue;
    $("sort").append(new Option(title, name));
  }
  let timer = 0;
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(update, 60); });
  for (const id of ["bucket", "sort"]) $(id).addEventListener("change", update);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
}

const text = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const number = (name, sign) => (a, b) => sign * ((a[name] ?? sign * Infinity) - (b[name] ?? sign * Infinity)) || text(a.source, b.source);
const orders = {
  source: (a, b) => text(a.source, b.source) || text(a.id, b.id),
  caption: (a, b) => text(a.text, b.text),
  longest: (a, b) => b.text.length - a.text.length || text(a.source, b.source),
  score: number("score", -1), seconds: number("seconds", -1), mean: number("mean", 1), std: number("std", 1),
};

function update() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const bucket = $("bucket").value;
  shown = items.filter((item) =>
    (!bucket || item.bucket === bucket) && [...chosen].every((flag) => item.flags.includes(flag)) && words.every((word) => item.haystack.includes(word)));
  shown.sort(orders[$("sort").value]);
  $("count").textContent = shown.length.toLocaleString("en") + " of " + items.length.toLocaleString("en");
  $("none").hidden = shown.length > 0;
  active = 0;
  draw(true);
}

/* Only the cards near the window exist. */
const HEIGHT = 212, GAP = 12, LEAST = 270, SPARE = 2;
const cards = new Map();
let columns = 1, active = 0;

function draw(anew) {
  const grid = $("grid");
  const width = grid.clientWidth;
  columns = Math.max(1, Math.floor((width + GAP) / (LEAST + GAP)));
  grid.style.height = Math.ceil(shown.length / columns) * (HEIGHT + GAP) + "px";
  const top = -grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(top / (HEIGHT + GAP)) - SPARE) * columns;
  const last = Math.min(shown.length, (Math.ceil((top + innerHeight) / (HEIGHT + GAP)) + SPARE) * columns);
  const wanted = new Set();
  for (let place = first; place < last; place++) wanted.add(place);
  const held = cards.get(active);
  if (held && held === document.activeElement && !anew) wanted.add(active);
  for (const [place, card] of cards) if (anew || !wanted.has(place)) { card.remove(); cards.delete(place); }
  const size = (width - GAP * (columns - 1)) / columns;
  for (const place of wanted) {
    if (!cards.has(place)) { cards.set(place, build(place)); grid.append(cards.get(place)); }
    const card = cards.get(place);
    card.style.width = size + "px";
    card.style.height = HEIGHT + "px";
    card.style.transform = "translate(" + (place % columns) * (size + GAP) + "px," + Math.floor(place / columns) * (HEIGHT + GAP) + "px)";
    card.tabIndex = place === active ? 0 : -1;
  }
  /* One card is always within reach of the tab key. */
  if (!wanted.has(active) && last > first) { active = first; cards.get(active).tabIndex = 0; }
}

function build(place) {
  const item = shown[place];
  const card = make("div", undefined, item.failed ? "card failed" : "card");
  card.setAttribute("role", "listitem");
  card.setAttribute("aria-posinset", String(place + 1));
  card.setAttribute("aria-setsize", String(shown.length));
  card.setAttribute("aria-label", item.source + ": " + item.text);
  card.dataset.place = String(place);
  const picture = make("div", undefined, "picture");
  if (item.picture) {
    const image = make("img");
    image.src = item.picture;
    image.alt = "";
    image.decoding = "async";
    picture.append(image);
  }
  const body = make("div", undefined, "text");
  body.append(make("div", item.source, "source"), make("div", item.text, "caption"));
  const facts = make("div", undefined, "facts");
  facts.append(make("span", item.failed ? item.window : item.bucket));
  for (const flag of item.flags) facts.append(make("span", flag, flag === "failed" ? "flag failed" : "flag"));
  card.append(picture, body, facts);
  return card;
}

function focus(place) {
  if (!shown.length) return;
  active = Math.max(0, Math.min(shown.length - 1, place));
  const line = $("controls").offsetHeight + GAP;
  const top = $("grid").getBoundingClientRect().top + Math.floor(active / columns) * (HEIGHT + GAP);
  if (top < line) scrollBy(0, top - line);
  else if (top + HEIGHT > innerHeight - GAP) scrollBy(0, top + HEIGHT - innerHeight + GAP);
  draw(false);
  const card = cards.get(active);
  if (card) card.focus({ preventScroll: true });
}

function open(place) {
  const item = shown[place];
  $("detail-title").textContent = item.source;
  $("detail-caption").textContent = item.text;
  $("detail-picture").hidden = !item.picture;
  if (item.picture) $("detail-picture").src = item.picture;
  $("detail-facts").replaceChildren();
  for (const [name, value] of Object.entries(item)) {
    if (["picture", "haystack", "text", "caption", "reason", "source", "failed"].includes(name) || value === null) continue;
    const shownValue = Array.isArray(value) ? value.join(", ") || "-" : typeof value === "number" && !Number.isInteger(value) ? value.toFixed(4) : String(value);
    $("detail-facts").append(make("dt", name.replaceAll("_", " ")), make("dd", shownValue));
  }
  $("detail").showModal();
}

const placeOf = (event) => {
  const card = event.target.closest(".card");
  return card ? Number(card.dataset.place) : -1;
};
$("grid").addEventListener("click", (event) => {
  const place = placeOf(event);
  if (place >= 0) { focus(place); open(place); }
});
$("grid").addEventListener("keydown", (event) => {
  const place = placeOf(event);
  if (place < 0) return;
  const page = Math.max(1, Math.floor(innerHeight / (HEIGHT + GAP)) - 1) * columns;
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key in moves) { event.preventDefault(); focus(place + moves[event.key]); }
  else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(place); }
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || $("detail").open || event.target === $("search")) return;
  event.preventDefault();
  $("search").focus();
});
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
let waiting = false;
const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(false); }); } };
addEventListener("scroll", later, { passive: true });
addEventListener("resize", later);
head();
controls();
update();
document.documentElement.dataset.ready = "yes";
