// Small drawing routines on canvases. Colours come from the style sheet, so that light and dark need no second thought.
"use strict";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A context scaled to the screen's own pixels, cleared; width and height are in CSS pixels. */
function paper(canvas) {
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** The least of 1, 2, 5, 10, ... that is not below a value. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((digit) => digit * power).find((step) => step >= value * 0.9999);
}

/** Mean of each value and the ones before it: a long step reports all its tokens at once. */
function smooth(values, span) {
  return values.map((_, end) => {
    const window = values.slice(Math.max(0, end - span + 1), end + 1);
    return window.reduce((sum, value) => sum + value, 0) / window.length;
  });
}

/** A curve whose right edge is now; `most` values are the whole width. */
function drawCurve(canvas, values, most, name) {
  const { context, width, height } = paper(canvas);
  const [top, bottom, left] = [8, height - 18, 46];
  const peak = Math.max(...values, 0);
  const scale = peak > 0 ? roundUp(peak) : 1;
  const x = (place) => left + ((most - values.length + place + 0.5) / most) * (width - left);
  const y = (value) => bottom - (value / scale) * (bottom - top);
  context.font = "11px system-ui, sans-serif";
  context.lineWidth = 1;
  for (const part of [0, 0.5, 1]) {
    const line = Math.round(y(scale * part)) + 0.5;
    context.strokeStyle = colour("line");
    context.beginPath();
    context.moveTo(left, line);
    context.lineTo(width, line);
    context.stroke();
    context.fillStyle = colour("dim");
    context.textAlign = "right";
    context.textBaseline = "middle";
    if (peak > 0 || part === 0) context.fillText(short(scale * part), left - 7, line);
  }
  context.textBaseline = "alphabetic";
  const marks = [[5, "left"], [4, "center"], [3, "center"], [2, "center"], [1, "center"], [0, "right"]]
    .filter(([minutes]) => width > 420 || minutes % 2 === 0);
  for (const [minutes, align] of marks) {
    context.textAlign = align;
    const at = width - ((minutes * 60) / most) * (width - left);
    context.fillText(minutes ? `−${minutes} min` : "now", at, height - 3);
  }
  if (values.length < 2) return;
  context.beginPath();
  values.forEach((value, place) => context.lineTo(x(place), y(value)));
  context.strokeStyle = colour(name);
  context.lineWidth = 1.6;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(x(values.length - 1), bottom);
  context.lineTo(x(0), bottom);
  context.globalAlpha = 0.13;
  context.fillStyle = colour(name);
  context.fill();
  context.globalAlpha = 1;
}

/** Squares in reading order; each stands for the same number of blocks. Returns blocks per square. */
function drawBlocks(canvas, parts, total) {
  const { context, width, height } = paper(canvas);
  const side = 9, gap = 2, rows = Math.floor((height + gap) / (side + gap));
  const columns = Math.max(1, Math.floor((width + gap) / (side + gap)));
  const perSquare = Math.max(1, Math.ceil(total / (rows * columns)));
  const squares = Math.ceil(total / perSquare);
  const wide = (width + gap) / columns;
  let before = 0;
  const ends = parts.map(([name, blocks]) => [name, (before += blocks)]);
  for (let square = 0; square < squares; square++) {
    const [from, to] = [square * perSquare, Math.min(total, (square + 1) * perSquare)];
    const [left, top] = [(square % columns) * wide, Math.floor(square / columns) * (side + gap)];
    let start = from;
    for (const [name, end] of ends) {
      if (end <= start || start >= to) continue;
      const until = Math.min(end, to);
      const box = wide - gap;
      context.fillStyle = colour(name);
      context.fillRect(left + (box * (start - from)) / (to - from), top, (box * (until - start)) / (to - from), side);
      start = until;
    }
  }
  return perSquare;
}

/** 1234567 as 1.23 M: three digits. */
function short(value) {
  for (const [size, unit] of [[1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))}${unit}`;
  }
  return value < 10 ? String(Math.round(value * 10) / 10) : String(Math.round(value));
}
