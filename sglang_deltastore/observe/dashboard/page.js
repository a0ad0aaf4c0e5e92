"use strict";
// Everything that reaches the page goes through textContent or setAttribute: nothing users wrote is read as markup.
const STATS_URL = "deltastore/stats", SHORTEST_PAUSE_MS = 2000, COST_SHARE = 1 / 200;
const LABEL_TOP = 12, LABEL_LINE = 14; // of charts
const el = (id) => document.getElementById(id);
const number = (value, digits = 0) => value.toLocaleString("en", {maximumFractionDigits: digits, minimumFractionDigits: digits});
const brief = (value, digits = 0) => value < 1e6 ? number(value, digits) : value.toLocaleString("en", {notation: "compact", maximumFractionDigits: 1});
const times = (value) => number(value, 2) + "×";
const percent = (value) => number(100 * value, 1) + "%";
const nats = (value) => value ? String(Number(value.toPrecision(2))) : "0";
const tokens = (value) => `${number(value)} token${value === 1 ? "" : "s"}`;
function bytes(value) {
  const power = Math.min(Math.floor(Math.log(Math.max(value, 1)) / Math.log(1024)), 4);
  return number(value / 1024 ** power, power ? 1 : 0) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][power];
}
function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// ---- asking ----
let snapshots = [], paused = false, timer = 0;
let key = sessionStorage.getItem("deltastore-key"); // of this tab

async function ask() {
  clearTimeout(timer);
  let pause = SHORTEST_PAUSE_MS;
  try {
    const answer = await fetch(STATS_URL, {cache: "no-store", headers: key ? {Authorization: `Bearer ${key}`} : {}});
    if (answer.status === 401) return askForKey();
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    snapshots = await answer.json();
    show();
    pause = Math.max(pause, 1000 * Math.max(...snapshots.map((one) => one.snapshot_seconds)) / COST_SHARE);
  } catch (error) {
    problem(`No facts from the server: ${error.message}. Asking again.`);
  }
  if (!paused && !document.hidden) timer = setTimeout(ask, pause);
}
function askForKey() {
  problem(key ? "The server does not know this key." : "");
  if (el("ask-key").hidden) {
    el("ask-key").hidden = false;
    el("key").focus();
  }
}
el("ask-key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = el("key").value;
  sessionStorage.setItem("deltastore-key", key);
  el("ask-key").hidden = true;
  ask();
});
function problem(text) {
  if (el("problem").textContent !== text) el("problem").textContent = text;
  el("problem").hidden = !text;
}
el("pause").addEventListener("click", () => {
  paused = !paused;
  el("pause").setAttribute("aria-pressed", paused);
  clearTimeout(timer);
  if (!paused) ask();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) ask(); });
el("which").addEventListener("change", show);
new ResizeObserver(() => { if (snapshots.length) show(); }).observe(el("tree"));

function show() {
  const which = el("which");
  while (which.length < snapshots.length) which.append(make("option", {value: which.length}, String(which.length)));
  el("which-label").hidden = snapshots.length < 2;
  const stats = snapshots[Number(which.value) || 0];
  el("tier").textContent = `tier ${stats.tier} (${stats.format}${stats.calibrated ? ", calibrated" : ""}), pages of ${tokens(stats.page_tokens)}`;
  el("when").textContent = "as of " + new Date(1000 * stats.taken_at_s).toLocaleTimeString("en-GB");
  problem(stats.accounting_errors.length ? "The accounting of pages does not hold: " + stats.accounting_errors.join("; ") : "");
  el("lost").textContent = stats.untracked_tokens ? `${tokens(stats.untracked_tokens)} are in nodes that the facts have lost sight of: the tree below is not whole.` : "";
  el("lost").hidden = !stats.untracked_tokens;
  el("prompts").hidden = !stats.nodes.some((node) => node.text);
  cards(stats);
  canary(stats);
  bar(el("pages-bar"), number, [["free", stats.pages_free, "free"], ["in nodes of the tree", stats.pages_in_nodes - stats.pages_held, "c0"], ["in nodes that requests read now", stats.pages_held, "c3"], ["of running requests", stats.pages_running, "c1"]]);
  bar(el("bytes-bar"), bytes, ["codes", "scales", "padding", "frames", "sinks", "maps"].map((kind, at) => [kind, stats[kind + "_bytes"], "c" + at]));
  hitCurve(stats);
  tree(stats);
  nodeTable(stats.nodes);
  history(stats);
  counts(stats);
}

// ---- figures ----
function facts(list, rows) {
  list.replaceChildren(...rows.map(([name, value, why]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value), ...(why ? [make("dd", {class: "why"}, why)] : []))));
}
function cards(stats) {
  const holds = stats.stored_tokens > 0; // what is saved of nothing is no figure
  const ratio = (value) => holds ? times(value) : "–", told = (text) => holds ? text : "nothing is stored yet";
  facts(el("cards"), [
    ["against fp16 without sharing", ratio(stats.times_unshared_fp16), told(`${bytes(stats.used_bytes)} instead of ${bytes(stats.fp16_unshared_bytes)}`)],
    ["against SGLang's own tree (fp16, shared)", ratio(stats.times_shared_fp16), told(`instead of ${bytes(stats.fp16_shared_bytes)}`)],
    ["by compression", times(stats.ratio), `${number(stats.bytes_per_token)} bytes a token, not ${number(stats.fp16_bytes_per_token)}`],
    ["by sharing", ratio(stats.dedup), told(`prefixes ${times(stats.prefix_dedup)}, branches ${times(stats.branch_dedup)}`)],
    ...(stats.demoted_tokens ? [["coarse", percent(stats.coarse_tokens / Math.max(stats.stored_tokens, 1)), `of stored tokens: ${number(stats.coarse_tokens)}; encoded again for room ${number(stats.demoted_tokens)}`]] : []),
    ["contexts", number(stats.contexts), `in ${number(stats.conversations)} conversations: ${tokens(stats.logical_tokens)}, ${number(stats.stored_tokens)} stored`],
    ["of prompts found stored", stats.prompt_tokens ? percent(stats.hit_tokens / stats.prompt_tokens) : "–", stats.prompt_tokens ? `${number(stats.hit_tokens)} of ${tokens(stats.prompt_tokens)}` : "no request has ended yet"],
  ]);
}
// Answers that were run once more with raw attention: what was served against that.
function canary(stats) {
  if (!stats.canary_share) return facts(el("canary-cards"), [["not measured", "–", "--kv-compress-canary 0.01 does it for a hundredth of the requests"]]);
  const none = !stats.canary_tokens, part = (named, parts) => Object.entries(parts).filter(([, one]) => one.tokens)
    .map(([name, one]) => [`${named} ${name}`, nats(one.kl_mean), `worst ${nats(one.kl_worst)}, ${percent(one.top1_agreement)} alike, of ${tokens(one.tokens)}`]);
  facts(el("canary-cards"), [
    ["nats of KL a token", none ? "–" : nats(stats.canary_kl_mean), none ? "no answer has been compared yet" : `the worst ${nats(stats.canary_kl_worst)}`],
    ["alike in the most likely token", none ? "–" : percent(stats.canary_top1_agreement), `of ${tokens(stats.canary_tokens)} in ${number(stats.canary_sequences)} answers`],
    ...part("found stored: up to", stats.canary_by_hit), ...part("context: up to", stats.canary_by_context),
    ["spent on it", number(stats.canary_seconds, 1) + " s", `${number(stats.canary_waiting)} wait; left out ${number(stats.canary_too_long)} too long, ${number(stats.canary_overtaken)} without idle time, ${number(stats.canary_not_comparable)} not text alone`],
  ]);
}
function counts(stats) {
  facts(el("counts"), [
    ["requests ended", number(stats.requests)],
    ["evictions", number(stats.evictions), `${tokens(stats.evicted_tokens)}, ${number(stats.eviction_seconds, 2)} s`],
    ["tokens encoded", number(stats.encoded_tokens)],
    ["read by decode", bytes(stats.decode_read_bytes), `in ${number(stats.decode_steps)} steps`],
    ["evictions for a sink", number(stats.sink_evictions), `${number(stats.sinks_free)} of ${number(stats.sinks_total)} sinks free`],
    ["calibration's staleness", stats.calibration_staleness ? times(stats.calibration_staleness) : "–", staleness(stats)],
    ["frames in use", `${number(stats.frames_running)} of ${number(stats.frames_total)}`],
  ]);
}
function staleness(stats) {
  if (!stats.calibrated) return "not calibrated";
  if (stats.recalibration_pays) return "a new calibration would pay: deltastore calibrate --text FILE --context-length T";
  return stats.calibration_staleness ? "1× is as good as new" : "too few requests yet";
}
function bar(box, text, parts) {
  const whole = parts.reduce((sum, part) => sum + part[1], 0) || 1;
  const label = parts.map(([name, value]) => `${name}: ${text(value)}`).join(", ");
  let [picture, legend] = box.children;
  if (!picture) {
    picture = svg("svg", {height: 28, role: "img"}, ...parts.map(([, , color]) => svg("rect", {height: 28, fill: `var(--${color})`})));
    legend = make("ul", {class: "legend"}, ...parts.map(([, , color]) => make("li", {}, svg("svg", {viewBox: "0 0 1 1", "aria-hidden": "true"}, svg("rect", {width: 1, height: 1, fill: `var(--${color})`})), document.createTextNode(""))));
    box.append(picture, legend);
  }
  picture.setAttribute("aria-label", label);
  let before = 0;
  parts.forEach(([name, value], at) => {
    picture.children[at].setAttribute("x", 100 * before / whole + "%");
    picture.children[at].setAttribute("width", 100 * value / whole + "%");
    legend.children[at].lastChild.textContent = `${name} ${text(value)} (${percent(value / whole)})`;
    before += value;
  });
}

// ---- hit rate against memory ----
function hitCurve(stats) {
  el("hit-curve").hidden = !stats.hit_rate_prompt_tokens;
  el("hit-curve-help").textContent = `Of the last ${tokens(stats.hit_rate_prompt_tokens)} of prompts, the share that the device has found stored (×1), and would have with other KV memory.`;
  const points = [[.25, stats.hit_rate_0_25x], [.5, stats.hit_rate_0_5x], [1, stats.hit_rate_1x], [2, stats.hit_rate_2x], [4, stats.hit_rate_4x], [8, stats.hit_rate_8x]];
  const width = 560, height = 190, left = 40, right = width - 40, top = 28, bottom = height - 40;
  const x = (at) => left + (right - left) * at / (points.length - 1), y = (rate) => bottom - (bottom - top) * rate;
  const label = points.map(([size, rate]) => `${size} times: ${percent(rate)}`).join(", ");
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Prompt tokens found stored by memory, ${label}`});
  for (const rate of [0, .5, 1]) picture.append(svg("line", {class: "grid", x1: left, x2: right, y1: y(rate), y2: y(rate)}));
  picture.append(svg("path", {d: "M" + points.map(([, rate], at) => `${x(at)} ${y(rate).toFixed(1)}`).join("L"), fill: "none", stroke: "var(--c1)", "stroke-width": 2}));
  points.forEach(([size, rate], at) => {
    const now = size === 1, text = (value, height, kind) => svg("text", {x: x(at), y: height, "text-anchor": "middle", ...(kind && {class: kind})}, value);
    if (now) picture.append(svg("line", {class: "grid", x1: x(at), x2: x(at), y1: top, y2: bottom, "stroke-dasharray": "3 3"}));
    picture.append(svg("circle", {cx: x(at), cy: y(rate), r: now ? 6 : 3, fill: "var(--c1)"}), text(percent(rate), y(rate) - 10, now ? "end" : "dim"),
      text(now ? "now" : `×${size}`, bottom + 16, now ? "end" : "dim"), text(brief(size * stats.capacity_tokens), bottom + 32, "dim"));
  });
  el("hit-curve-chart").replaceChildren(make("figure", {}, make("figcaption", {}, "Prompt tokens found stored, by tokens that the memory holds"), picture));
}

// ---- the tree ----
let chosen = null; // id of the node that the keyboard is at
function tree(stats) {
  const picture = el("tree"), hadFocus = picture.contains(document.activeElement);
  const nodes = new Map(stats.nodes.map((node) => [node.id, {...node, below: []}]));
  const roots = [];
  for (const node of nodes.values()) (nodes.get(node.parent)?.below ?? roots).push(node);
  const rows = roots.reduce((sum, node) => sum + node.contexts, 0);
  const deepest = Math.max(...roots.map(reach), 1);
  const width = picture.clientWidth || 900, height = rows ? Math.min(Math.max(26 * rows, 120), 420) : 40;
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("height", height);
  if (!nodes.has(chosen)) chosen = roots[0]?.id ?? null;
  const scale = {x: width / deepest, y: height / Math.max(rows, 1), most: Math.max(...stats.nodes.map((node) => node.contexts), 2)};
  picture.replaceChildren(...draw(roots, 0, 0, scale));
  if (!roots.length) picture.append(svg("text", {x: 12, y: 25, class: "dim"}, "Nothing is stored yet."));
  const unseen = stats.nodes_total - stats.nodes.length;
  el("tree-more").textContent = unseen > 0 ? `${number(stats.nodes.length)} of ${number(stats.nodes_total)} nodes: those with the most hits, and all above them.` : "";
  if (hadFocus) picture.querySelector('[tabindex="0"]')?.focus();
  steps(roots, null);
  tell(nodes.get(chosen));
}
// Lengths are square roots of tokens: a turn of fifty tokens can be seen behind a prompt of thousands.
function reach(node) {
  return Math.sqrt(node.tokens) + Math.max(0, ...node.below.map(reach));
}
function draw(siblings, x, top, scale, level = 1) {
  const drawn = [];
  for (const node of siblings) {
    const width = Math.sqrt(node.tokens) * scale.x;
    const y = top * scale.y, height = Math.max(node.contexts * scale.y, 1);
    const group = svg("g", {role: "treeitem", tabindex: node.id === chosen ? 0 : -1, "data-id": node.id, "aria-level": level, "aria-selected": node.id === chosen, "aria-label": sentence(node)},
      svg("rect", {class: "block", x, y, width, height, "fill-opacity": .12 + .38 * Math.log(node.contexts) / Math.log(scale.most)}));
    if (node.running) group.append(svg("rect", {class: "running", x: x + 1, y: y + 1, width: 4, height: Math.max(height - 2, 1)}));
    if (width > 70 && height > 16) {
      const inside = svg("svg", {x: x + 8, y, width: width - 10, height, overflow: "hidden", "aria-hidden": "true"});
      inside.append(svg("text", {y: 15}, `${number(node.tokens)} × ${number(node.contexts)}` + (node.running ? `, ${number(node.running)} running` : "")));
      if (node.text && height > 34) inside.append(svg("text", {y: 32}, plain(node.text)));
      group.append(inside);
    }
    group.append(svg("title", {}, sentence(node)));
    group.addEventListener("click", () => choose(node.id));
    drawn.push(group, ...draw(node.below, x + width, top, scale, level + 1));
    const hidden = node.children - node.below.length, shown = node.below.reduce((sum, child) => sum + child.contexts, 0);
    if (hidden > 0 && node.contexts > shown) {
      drawn.push(svg("rect", {class: "rest", x: x + width + 1, y: y + shown * scale.y + 1, width: 40, height: Math.max((node.contexts - shown) * scale.y - 2, 1)},
        svg("title", {}, `${number(hidden)} more nodes that are not shown`)));
    }
    top += node.contexts;
  }
  return drawn;
}
function plain(text) {
  return text.replace(/\s+/g, " ").trim();
}
function sentence(node) {
  const said = [`${tokens(node.tokens)} from token ${number(node.start_tokens)}`, `${number(node.contexts)} contexts of ${number(node.conversations)} conversations`,
    `${number(node.hits)} hits by ${number(node.requests)} ended requests`, `${number(node.running)} running`];
  if (node.text) said.push(`“${plain(node.text)}…”`);
  return said.join("; ");
}
function tell(node) {
  const text = node ? sentence(node) : "No block is chosen.";
  if (el("chosen").textContent !== text) el("chosen").textContent = text;
}
let moves = new Map(); // id -> {ArrowLeft: id, ...}
function steps(siblings, parent) {
  if (!parent) moves = new Map();
  siblings.forEach((node, at) => {
    moves.set(node.id, {ArrowLeft: parent?.id, ArrowRight: node.below[0]?.id, ArrowUp: siblings[at - 1]?.id, ArrowDown: siblings[at + 1]?.id});
    steps(node.below, node);
  });
}
function choose(id) {
  chosen = id;
  show();
  el("tree").querySelector(`[data-id="${id}"]`)?.focus();
}
el("tree").addEventListener("keydown", (event) => {
  const next = moves.get(chosen)?.[event.key];
  if (!event.key.startsWith("Arrow")) return;
  event.preventDefault();
  if (next !== undefined) choose(next);
});
function nodeTable(nodes) {
  const withText = nodes.some((node) => node.text);
  const head = ["node", "after", "from token", "tokens", "contexts", "conversations", "running", "requests", "hits", "tokens hit"];
  const row = (cells) => make("tr", {}, ...cells);
  const body = [...nodes].sort((a, b) => b.hit_tokens - a.hit_tokens).map((node) => row([
    make("th", {scope: "row"}, String(node.id)), make("td", {}, node.parent ? String(node.parent) : "start"),
    ...[node.start_tokens, node.tokens, node.contexts, node.conversations, node.running, node.requests, node.hits, node.hit_tokens].map((value) => make("td", {}, number(value))),
    ...(withText ? [make("td", {class: "text"}, plain(node.text))] : [])]));
  const titles = withText ? [...head, "begins"] : head;
  el("nodes").replaceChildren(make("thead", {}, row(titles.map((title) => make("th", {scope: "col"}, title)))), make("tbody", {}, ...body));
}

// ---- history ----
function history(stats) {
  const past = stats.history, now = past.time_s.length ? past.time_s.at(-1) : 0;
  const ages = past.time_s.map((time) => time - now);
  const shares = past.prompt_tokens.map((value, at) => {
    const prompts = at ? value - past.prompt_tokens[at - 1] : 0;
    return prompts > 0 ? (past.hit_tokens[at] - past.hit_tokens[at - 1]) / prompts : null;
  });
  const saved = past.used_bytes.map((used, at) => used ? past.logical_tokens[at] * stats.fp16_bytes_per_token / used : null);
  const costs = past.canary_tokens.map((value, at) => {
    const compared = at ? value - past.canary_tokens[at - 1] : 0;
    return compared > 0 ? (past.canary_kl_nats[at] - past.canary_kl_nats[at - 1]) / compared : null;
  });
  el("history").replaceChildren(
    chart("Tokens", ages, brief, [["logical", past.logical_tokens, "c0", ""], ["stored", past.stored_tokens, "c2", "6 3"]]),
    chart("Times smaller than fp16 without sharing", ages, (value) => brief(value, 1), [["", saved, "c3", ""]]),
    chart("Prompt tokens found stored", ages, percent, [["", shares, "c1", ""]], 1),
    ...(stats.canary_share ? [chart("KL of answers against raw attention, nats a token", ages, nats, [["", costs, "c4", ""]])] : []));
}
function chart(title, ages, text, series, highest = 0) {
  const width = 330, height = 130, left = 4, right = width - 86, bottom = height - 20;
  const seen = series.flatMap(([, values]) => values.filter((value) => value !== null));
  const top = Math.max(highest, ...seen) || 1, oldest = Math.min(ages[0] ?? -1, -60);
  const x = (age) => right - (right - left) * age / oldest, y = (value) => bottom - (bottom - 14) * value / top;
  const last = series.map(([name, values]) => `${name} ${values.length && values.at(-1) !== null ? text(values.at(-1)) : "nothing"}`.trim());
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}, last: ${last.join(", ")}; highest ${text(seen.length ? Math.max(...seen) : 0)}`});
  for (const value of [0, top / 2, top]) picture.append(svg("line", {class: "grid", x1: left, x2: right, y1: y(value), y2: y(value)}));
  picture.append(svg("text", {x: left, y: LABEL_TOP, class: "dim"}, text(top)), svg("text", {x: left, y: height - 4, class: "dim"}, `${number(-oldest / 60, 1)} min ago`),
    svg("text", {x: right, y: height - 4, "text-anchor": "end", class: "dim"}, "now"));
  const ends = series.map(([, values], at) => ({words: last[at].split(" "), y: y(values.findLast((value) => value !== null) ?? 0)})).sort((a, b) => a.y - b.y);
  series.forEach(([, values, color, dashes]) => {
    let line = "", pen = "M";
    values.forEach((value, at) => {
      if (value === null) return void (pen = "M");
      line += `${pen}${x(ages[at]).toFixed(1)} ${y(value).toFixed(1)} `;
      pen = "L";
      if (values.length < 40) picture.append(svg("circle", {cx: x(ages[at]), cy: y(value), r: 2, fill: `var(--${color})`}));
    });
    picture.append(svg("path", {d: line, fill: "none", stroke: `var(--${color})`, "stroke-width": 2, "stroke-dasharray": dashes}));
  });
  // Labels stand where their lines end; those that would touch move apart, and all stay inside.
  let free = LABEL_TOP;
  for (const end of ends) {
    end.top = Math.max(end.y + 4, free);
    free = end.top + LABEL_LINE * end.words.length;
  }
  let below = bottom + LABEL_LINE;
  for (const end of ends.reverse()) {
    end.top = Math.min(end.top, below - LABEL_LINE * end.words.length);
    below = end.top;
    end.words.forEach((word, at) => picture.append(svg("text", {class: "end", x: right + 6, y: end.top + LABEL_LINE * at}, word)));
  }
  return make("figure", {}, make("figcaption", {}, title), picture);
}

ask();
