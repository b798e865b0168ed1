// The live page: asks /live once a second and shows the answer. All text goes in by textContent; nothing is parsed as HTML.
"use strict";

const KEY = "thalweg-api-key", EVERY_MS = 1000, FEW = 6, PHASES = ["queue", "load", "prefill", "decode"];
const SOURCES = ["device", "host", "disk", "replayed", "computed"];
const REASONS = {
  "none": "all was cached", "cold": "nothing here yet", "too-short": "shorter than a unit", "diverged": "other tokens",
  "evicted": "gave way to others", "no-checkpoint": "no checkpoint", "tenant": "another salt",
  "weights": "other weights", "load-failed": "could not be read", "disabled": "caching is off",
};
const find = (id) => document.getElementById(id);
const number = (value) => Math.round(value).toLocaleString("en-US");
let last = null, timer = 0, shownRequests = "", showAll = false;

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const child of children) node.append(child); // strings become text nodes
  return node;
}

function bytes(value) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${(value / size).toLocaleString("en-US", { maximumSignificantDigits: 3 })} ${unit}`;
  }
  return `${value} B`;
}

function span(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A bar of parts [class, amount, title]; `whole` is its full length. */
function bar(parts, whole, className = "bar") {
  const node = make("div", className);
  for (const [name, amount, title] of parts) {
    if (!(amount > 0)) continue;
    const part = make("i", name);
    part.style.width = `${(100 * amount) / whole}%`;
    part.title = title;
    node.append(part);
  }
  return node;
}

function timeline(seconds, longest) {
  return bar(PHASES.map((name) => [name, seconds[name], `${name} ${span(seconds[name])}`]), longest);
}

const whole = (request) => PHASES.reduce((sum, name) => sum + request.seconds[name], 0);

function facts(...pieces) {
  const node = make("div", "facts");
  pieces.forEach(([value, unit], place) => node.append(place ? " · " : "", make("b", "", value), ` ${unit}`));
  return node;
}

function row(request, phase, label, bars, told, below) {
  const id = make("span", "id", request.id);
  id.title = request.id;
  const node = make("div", "request", id, make("span", `phase ${phase}`, label), make("div", "bars", ...bars), told);
  node.dataset.id = request.id;
  node.dataset.phase = phase;
  if (below) node.append(make("div", "sub", below));
  return node;
}

function openRow(request, longest) {
  const bars = [timeline(request.seconds, longest)];
  const told = [[span(whole(request)), "so far"]];
  if (request.phase === "decode") {
    told.unshift([number(request.output_tokens), "tokens out"]);
  } else if (request.phase === "prefill") {
    const share = request.done_tokens / request.prompt_tokens;
    bars.push(bar([["prefill", share, "of the prompt"]], 1, "bar thin"));
    told.unshift([`${number(request.done_tokens)} / ${number(request.prompt_tokens)}`, "tokens"]);
  } else {
    told.unshift([number(request.prompt_tokens), "tokens"]);
  }
  return row(request, request.phase, request.phase, bars, facts(...told));
}

function finishedRow(request, longest) {
  const told = [[span(whole(request)), ""]];
  if (request.ttft_seconds !== null) told.push([span(request.ttft_seconds), "to first token"]);
  if (request.tpot_seconds) told.push([short(1 / request.tpot_seconds), "tok/s"]);
  const sources = SOURCES.filter((name) => request.sources[name] > 0);
  const parts = sources.map((name) => [name, request.sources[name], `${name} ${number(request.sources[name])} tokens`]);
  const bars = [timeline(request.seconds, longest)];
  const words = [`${number(request.prompt_tokens)} prompt tokens`];
  if (sources.length) {
    words[0] += ": " + sources.map((name) => `${number(request.sources[name])} ${name}`).join(", ");
    bars.push(bar(parts, request.prompt_tokens, "bar thin"));
  }
  words.push(`${number(request.output_tokens)} out`);
  if (request.miss_reason && request.miss_reason !== "none") words.push(`cache: ${request.miss_reason}`);
  if (request.preemptions) words.push(`gave way ${request.preemptions} times`);
  if (request.error) words.push(request.error);
  return row(request, request.reason, request.reason, bars, facts(...told), words.join(" · "));
}

function showRequests(data) {
  const same = JSON.stringify([data.open, data.finished, showAll]);
  if (same === shownRequests) return; // keeps what a reader has selected
  shownRequests = same;
  const longest = (requests) => Math.max(...requests.map(whole), 1e-3);
  const rows = data.open.map((request) => openRow(request, longest(data.open)));
  if (data.more_open) rows.push(make("div", "empty", `and ${number(data.more_open)} more`));
  find("open").replaceChildren(...(rows.length ? rows : [make("div", "empty", "nothing is running")]));
  const ended = showAll ? data.finished : data.finished.slice(0, FEW);
  const done = ended.map((request) => finishedRow(request, longest(ended)));
  find("more").hidden = data.finished.length <= FEW;
  find("more").textContent = showAll ? "show fewer" : `show all ${data.finished.length}`;
  find("finished").replaceChildren(...(done.length ? done : [make("div", "empty", "nothing yet")]));
  find("whose").textContent = data.caller ? `of the key “${data.caller}”` : "";
}

function readout(label, value, unit = "") {
  return make("div", "", make("span", "", label), make("b", "", value), unit ? make("small", "", ` ${unit}`) : "");
}

function showReadouts(data, prefill, decode) {
  const { running, waiting, loading, preemptions } = data.status;
  const sources = data.totals.sources;
  const prompt = SOURCES.reduce((sum, name) => sum + (sources[name] || 0), 0);
  const cached = ["device", "host", "disk"].reduce((sum, name) => sum + (sources[name] || 0), 0);
  find("readouts").replaceChildren(
    readout("running", number(running), `of ${number(data.about.max_running)}`),
    readout("waiting", number(waiting), preemptions ? `${number(preemptions)} gave way` : ""),
    readout("loading", number(loading)),
    readout("prefill", short(prefill), "tok/s"),
    readout("decode", short(decode), "tok/s"),
    readout("prompt from cache", prompt ? `${((100 * cached) / prompt).toFixed(1)} %` : "–"),
  );
}

function showSpeed(data) {
  const most = Math.round(300 / data.speed.sample_seconds);
  const latest = {};
  for (const name of ["prefill", "decode"]) {
    const values = smooth(data.speed[name], 5);
    latest[name] = values.at(-1) || 0;
    find(`${name}-rate`).textContent = `${short(latest[name])} tok/s`;
    const canvas = find(`${name}-curve`);
    canvas.setAttribute("aria-label", `${name}: ${short(latest[name])} tokens per second now`);
    drawCurve(canvas, values, most, name);
  }
  return latest;
}

function showGroups(groups) {
  const place = find("groups");
  for (const group of groups) {
    let node = [...place.children].find((child) => child.dataset.group === group.group);
    if (!node) {
      const canvas = make("canvas");
      canvas.setAttribute("role", "img");
      node = make("div", "group", make("span", "name", group.group), canvas, make("div", "facts"));
      node.dataset.group = group.group;
      place.append(node);
    }
    const parts = [["own", group.in_use - group.shared], ["shared", group.shared], ["idle", group.idle], ["free", group.free]];
    const each = drawBlocks(node.children[1], parts, group.total);
    const words = `${number(group.in_use)} in use · ${number(group.cached)} cached (${number(group.idle)} idle) · ${number(group.total)} blocks`;
    node.children[1].setAttribute("aria-label", `${group.group}: ${words}`);
    const size = `${bytes(group.total * group.block_bytes)} · a square is ${each > 1 ? `${number(each)} blocks` : "a block"}, ${bytes(each * group.block_bytes)}`;
    node.children[2].replaceChildren(words, make("br"), size);
  }
}

function showTiers(tiers) {
  const rows = tiers.map((tier) => {
    const kinds = Object.entries(tier.used_bytes).filter(([, size]) => size > 0);
    const used = kinds.reduce((sum, [, size]) => sum + size, 0);
    const parts = kinds.map(([kind, size]) => [kind, size, `${kind} ${bytes(size)}`]);
    const node = make("div", "tier", make("span", "name", tier.tier), bar(parts, tier.capacity_bytes));
    const words = make("div", "facts", make("b", "", bytes(used)), ` of ${bytes(tier.capacity_bytes)} · ${number(tier.records)} records`);
    words.append(make("br"), `${bytes(tier.read_bytes)} read · ${bytes(tier.write_bytes)} written · ${bytes(tier.evicted_bytes)} evicted`);
    node.append(words);
    return node;
  });
  find("tiers").replaceChildren(...(rows.length ? rows : [make("div", "empty", "none: neither host memory nor a disk is used")]));
}

function measures(entries, classOf) {
  const sum = entries.reduce((total, [, value]) => total + value, 0);
  const most = Math.max(...entries.map(([, value]) => value), 1);
  return entries.map(([name, value, title]) => {
    const share = sum ? make("small", "", ` ${((100 * value) / sum).toFixed(0)} %`) : "";
    const node = make("div", "measure", make("span", "", name), bar([[classOf(name), value, title || name]], most), make("b", "", number(value), share));
    node.title = title || "";
    node.dataset.name = name;
    return node;
  });
}

function showHits(data) {
  const { sources, reasons, ended } = data.totals;
  find("sources").replaceChildren(...measures(SOURCES.map((name) => [name, sources[name] || 0]), (name) => name));
  const counted = Object.entries(reasons).sort((a, b) => b[1] - a[1]).map(([name, count]) => [name, count, REASONS[name]]);
  const rows = measures(counted, () => "prefill");
  find("reasons").replaceChildren(...(rows.length ? rows : [make("div", "empty", "no request yet")]));
  const total = Object.values(ended).reduce((sum, count) => sum + count, 0);
  const whose = data.caller ? ` of the key “${data.caller}”` : "";
  find("hits-note").textContent = `${number(total)} finished requests${whose} since start-up`;
}

function showAbout(data) {
  const about = data.about;
  const entries = [["model", about.model], ["context limit", `${number(about.max_model_len)} tokens`],
    ["cache holds", `${number(about.cache_tokens)} tokens`], ["up for", span(about.uptime_seconds)],
    ...Object.entries(about.choices), ["version", about.version],
    ...Object.entries(about.kernels).map(([backend, ops]) => [`kernels: ${backend}`, ops.join(", "), "wide"])];
  find("about").replaceChildren(...entries.map(([name, value, width]) => make("div", width, make("dt", "", name), make("dd", "", value))));
  const backends = Object.keys(about.kernels).join(", ");
  find("model").replaceChildren(make("b", "", about.model), ` · ${number(about.max_model_len)} tokens of context · ${backends} kernels`);
  document.title = `${data.status.running ? `${data.status.running} running · ` : ""}${about.model} · thalweg`;
}

function showState(kind, words) {
  const state = find("state");
  state.className = kind;
  state.children[1].textContent = words;
}

function show(data) {
  find("key-form").hidden = true;
  find("content").hidden = false;
  showState(data.status.healthy ? "good" : "bad", data.status.healthy ? "live" : "the engine is stopping");
  if (data.caller && sessionStorage.getItem(KEY)) {
    const forget = make("button", "plain", "forget the key");
    forget.addEventListener("click", () => askForKey(""));
    find("state").children[1].append(` as ${data.caller} · `, forget);
  }
  const latest = showSpeed(data);
  showReadouts(data, latest.prefill, latest.decode);
  showRequests(data);
  showGroups(data.groups);
  showTiers(data.tiers);
  showHits(data);
  showAbout(data);
}

function askForKey(problem) {
  sessionStorage.removeItem(KEY);
  last = null;
  find("content").hidden = true;
  find("key-form").hidden = false;
  find("key-problem").textContent = problem;
  find("model").textContent = "";
  shownRequests = "";
  find("open").replaceChildren();
  find("finished").replaceChildren();
  showState("", "waiting for a key");
  find("key").focus();
}

/** Ask once. False where a key is to be typed first. */
async function ask() {
  const key = sessionStorage.getItem(KEY);
  if (!key && document.documentElement.dataset.key) {
    askForKey("");
    return false;
  }
  const response = await fetch("live", { headers: key ? { "x-api-key": key } : {}, cache: "no-store" });
  if (response.status === 401) {
    askForKey("The server does not know this key.");
    return false;
  }
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  last = await response.json();
  show(last);
  return true;
}

async function turn() {
  clearTimeout(timer);
  let again = !document.hidden; // a page that nobody sees asks nothing
  try {
    again = (await ask()) && again;
  } catch (error) {
    showState("bad", error instanceof TypeError ? "no answer from the server" : error.message);
  }
  if (again) timer = setTimeout(turn, EVERY_MS);
}

find("more").addEventListener("click", () => {
  showAll = !showAll;
  show(last);
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = find("key").value.trim();
  find("key").value = "";
  if (/^[!-~]+$/.test(key)) {
    sessionStorage.setItem(KEY, key);
    turn();
  } else {
    find("key-problem").textContent = "A key has only ASCII letters, digits and signs.";
  }
});
document.addEventListener("visibilitychange", () => document.hidden || find("key-form").hidden === false || turn());
window.addEventListener("resize", () => last && show(last));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => last && show(last));
turn();
