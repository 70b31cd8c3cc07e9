"use strict";
// Every chart is whole without this: it tells values under the pointer, zooms where one drags, hides the curves
// whose keys are pressed, and enlarges. Matplotlib drew the curves; here they are only moved.

function told(value, kind) {
  if (kind === "percent") return `${(100 * value).toLocaleString("en", { maximumSignificantDigits: 3 })} %`;
  const isPlain = value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6);
  return isPlain ? value.toLocaleString("en", { maximumSignificantDigits: 4 }) : value.toExponential(1);
}

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function makeChart(plot) {
  const svg = plot.querySelector("svg"), figure = plot.closest(".chart");
  const { box, x: wholeX, y: wholeLimits, unit, kind, curves } = JSON.parse(svg.querySelector("metadata").textContent);
  const [left, top, right, bottom] = box;
  const isLog = kind === "log", scaled = isLog ? Math.log10 : (value) => value;
  const wholeY = wholeLimits.map(scaled);
  const create = (name, parent) => parent.appendChild(document.createElementNS(svg.namespaceURI, name));
  const onto = (value, [low, high], from, to) => from + ((value - low) / (high - low)) * (to - from);
  let x = wholeX, y = wholeY, at = null, start = null;

  // What Matplotlib drew of each curve: paths, whose coordinates are numbers in pairs, and marks.
  const parts = [...svg.querySelectorAll("[data-curve]")].flatMap((group) =>
    [...group.querySelectorAll(":scope > path, use")].map((element) => {
      const d = element.getAttribute("d");
      const pairs = d === null ? [["x", "y"].map((name) => Number(element.getAttribute(name)))]
        : [...d.matchAll(/(-?[\d.]+) (-?[\d.]+)/g)].map((match) => [Number(match[1]), Number(match[2])]);
      const points = pairs.map(([px, py]) => [onto(px, [left, right], ...wholeX), onto(py, [bottom, top], ...wholeY)]);
      return { group, element, d, pairs, points };
    }));

  const range = create("rect", svg), mark = create("path", svg), zoomed = create("g", svg);
  range.setAttribute("class", "range");
  mark.setAttribute("class", "mark");
  zoomed.setAttribute("class", "ticks");
  svg.insertBefore(zoomed, svg.firstChild);
  const tip = plot.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.setAttribute("role", "status");
  const whole = figure.querySelector(".whole");

  function drawTicks() {
    zoomed.replaceChildren();
    const isWhole = x === wholeX;
    for (const each of svg.querySelectorAll(".tick")) each.style.display = isWhole ? "" : "none";
    if (isWhole) return;
    const inDecades = isLog && y[1] - y[0] > 1.5;
    const values = inDecades ? ticks(y[0], y[1], 5).filter(Number.isInteger).map((each) => 10 ** each)
      : isLog ? ticks(10 ** y[0], 10 ** y[1], 4) : ticks(y[0], y[1], 4);
    const draw = (d, px, py, anchor, text) => {
      create("path", zoomed).setAttribute("d", d);
      const label = create("text", zoomed);
      for (const [name, value] of [["x", px], ["y", py], ["text-anchor", anchor]]) label.setAttribute(name, value);
      label.textContent = text;
    };
    for (const value of ticks(...x, 6)) {
      const px = onto(value, x, left, right);
      draw(`M ${px} ${bottom} V ${top}`, px, bottom + 10.7, "middle", told(value, ""));
    }
    for (const value of values) {
      const py = onto(scaled(value), y, bottom, top);
      draw(`M ${left} ${py} H ${right}`, left - 3.5, py + 3.6, "end", told(value, kind));
    }
  }

  function draw() {
    for (const { element, d, pairs, points } of parts) {
      const moved = x === wholeX ? pairs : points.map(([px, py]) => [onto(px, x, left, right), onto(py, y, bottom, top)]);
      let i = 0;
      if (d !== null && x === wholeX) element.setAttribute("d", d);
      else if (d !== null) element.setAttribute("d", d.replace(/(-?[\d.]+) (-?[\d.]+)/g, () => moved[i++].join(" ")));
      else ["x", "y"].forEach((name, k) => element.setAttribute(name, moved[0][k]));
    }
    drawTicks();
    whole.hidden = x === wholeX;
    tell(at);
  }

  function zoom(low, high) {
    const span = wholeX[1] - wholeX[0];
    [low, high] = [Math.max(low, wholeX[0]), Math.min(high, wholeX[1])];
    if (high - low < span / 1000) return;
    if (high - low > 0.999 * span) {
      [x, y] = [wholeX, wholeY];
    } else {
      x = [low, high];
      // As high as what is seen of it, with the points on both sides, to which lines lead.
      const isIn = (point) => point !== undefined && point[0] >= low && point[0] <= high;
      const seen = parts.filter(({ group }) => group.style.display !== "none").flatMap(({ points }) =>
        points.filter((point, i) => isIn(point) || isIn(points[i - 1]) || isIn(points[i + 1])).map((point) => point[1]));
      const [least, most] = [Math.min(...seen), Math.max(...seen)];
      const room = 0.05 * (most - least);
      y = most > least ? [least - room, most + room] : wholeY;
    }
    draw();
  }

  function shown() {
    return curves.filter((_, i) => svg.querySelector(`[data-curve="${i}"]`)?.style.display !== "none");
  }

  // The points nearest to a place: the nearest of all, and those of other curves that are hardly further.
  function tell(value) {
    at = value;
    tip.replaceChildren();
    mark.setAttribute("d", "");
    if (value === null) return;
    const nearest = shown().map((curve) => {
      const i = curve.x.reduce((best, each, k) => (Math.abs(each - value) < Math.abs(curve.x[best] - value) ? k : best), 0);
      return { curve, x: curve.x[i], y: curve.y[i] };
    }).filter((each) => each.x >= x[0] && each.x <= x[1]);
    if (!nearest.length) return;
    at = nearest.reduce((best, each) => (Math.abs(each.x - value) < Math.abs(best.x - value) ? each : best)).x;
    const px = onto(at, x, left, right), size = svg.viewBox.baseVal;
    mark.setAttribute("d", `M ${px} ${top} V ${bottom}`);
    tip.style.left = `${(100 * px) / size.width}%`;
    tip.classList.toggle("before", px > (left + right) / 2);
    tip.appendChild(document.createElement("b")).textContent = `${unit} ${told(at, "")}`;
    for (const each of nearest.filter((one) => Math.abs(one.x - at) <= 0.03 * (x[1] - x[0]))) {
      const row = tip.appendChild(document.createElement("span"));
      row.style.setProperty("--c", `var(${each.curve.colour})`);
      row.textContent = `${each.curve.label} ${told(each.y, kind)}` + (each.x === at ? "" : ` (at ${told(each.x, "")})`);
    }
  }

  const under = (event) => {
    const place = svg.getBoundingClientRect();
    const px = ((event.clientX - place.left) / place.width) * svg.viewBox.baseVal.width;
    return onto(Math.min(Math.max(px, left), right), [left, right], ...x);
  };
  const release = () => {
    start = null;
    range.setAttribute("width", 0);
  };
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = under(event);
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    tell(under(event));
    if (start === null) return;
    const [from, to] = [start, under(event)].sort((a, b) => a - b).map((each) => onto(each, x, left, right));
    for (const [name, value] of [["x", from], ["y", top], ["width", to - from], ["height", bottom - top]])
      range.setAttribute(name, value);
  });
  plot.addEventListener("pointerup", (event) => {
    const [from, to] = [start ?? under(event), under(event)].sort((a, b) => a - b);
    release();
    if (to - from > 0.02 * (x[1] - x[0])) zoom(from, to);
    else tell(under(event));
  });
  plot.addEventListener("pointercancel", release);
  plot.addEventListener("pointerleave", () => tell(null));
  plot.addEventListener("blur", () => tell(null));
  plot.addEventListener("dblclick", () => zoom(...wholeX));

  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-label", `${figure.querySelector("h3").textContent}: the arrow keys tell values, plus and minus zoom, Escape shows all`);
  plot.addEventListener("keydown", (event) => {
    const places = [...new Set(shown().flatMap((curve) => curve.x))].filter((each) => each >= x[0] && each <= x[1]).sort((a, b) => a - b);
    const middle = at ?? (x[0] + x[1]) / 2, span = x[1] - x[0];
    const i = at === null ? -1 : places.indexOf(at);
    const actions = {
      ArrowRight: () => tell(places[Math.min(i + 1, places.length - 1)] ?? null),
      ArrowLeft: () => tell(places[Math.max(i < 0 ? places.length - 1 : i - 1, 0)] ?? null),
      "+": () => zoom(middle - span / 4, middle + span / 4),
      "=": () => zoom(middle - span / 4, middle + span / 4),
      "-": () => zoom(middle - span, middle + span),
      Escape: () => zoom(...wholeX),
    };
    if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  });

  whole.addEventListener("click", () => {
    zoom(...wholeX);
    plot.focus();
  });
  return (label, isShown) => {
    curves.forEach((curve, i) => {
      if (curve.label !== label) return;
      for (const each of svg.querySelectorAll(`[data-curve="${i}"]`)) each.style.display = isShown ? "" : "none";
    });
    if (x !== wholeX) zoom(...x);
    tell(null);
  };
}

for (const each of document.querySelectorAll(".howto")) each.hidden = false;
const show = new Map();
for (const plot of document.querySelectorAll(".plot")) show.set(plot.closest(".chart"), makeChart(plot));

// A key is a button. Those of a chart are for that chart; those above all charts, of a comparison, are for all.
for (const keys of document.querySelectorAll(".chart .keys, .keys.all")) {
  const chosen = keys.closest(".chart") ? [show.get(keys.closest(".chart"))] : [...show.values()];
  for (const item of keys.children) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...item.childNodes);
    button.setAttribute("aria-pressed", "true");
    item.append(button);
    button.addEventListener("click", () => {
      const isShown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(isShown));
      for (const each of chosen) each(item.dataset.label, isShown);
    });
  }
}

for (const button of document.querySelectorAll(".zoom")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const isLarge = button.closest(".chart").classList.toggle("large");
    button.setAttribute("aria-pressed", String(isLarge));
    button.firstChild.textContent = isLarge ? "Shrink" : "Enlarge";
  });
}
