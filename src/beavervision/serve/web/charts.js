// A report as pictures: where the time went, and the mouth against the sound. Inline SVG, with tables for who cannot see it.

import { clock, h, svg } from "./dom.js";

const STAGES = {
  decode: "Read the picture",
  detect: "Find the face",
  hear: "Hear the speech",
  direct: "Choose the expression",
  express: "Draw the expression",
  lipsync: "Move the mouth",
  enhance: "Enhance",
  restore: "Restore",
  render: "Blend it in",
  watch: "Check",
  encode: "Write the video",
};
const BAR_PX = 16;
const ROW_PX = 28;
const NAME_PX = 140;
const FIGURE_PX = 72;

const ms = (value) => (value === null || value === undefined ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);

/** Draw both charts of a report into `place`, as far as it has the figures. `onSeek` is told the second that is clicked. */
export function charts(place, report, onSeek) {
  const made = [];
  const series = report.track?.series;
  if (series?.opening?.length) made.push(mouthChart(series, onSeek));
  const stages = Object.entries(report.times?.stages ?? {}).filter(([, stage]) => stage.pictures > 0);
  if (stages.length) made.push({ figure: stageChart(report.times, stages), at: () => {} });
  place.replaceChildren(...made.map((one) => one.figure));
  return { at: (time_s) => made.forEach((one) => one.at(time_s)) };
}

/** A drawing that is made anew for each width it is given; `draw(width_px)` gives its elements. */
function fitting(height, label, draw) {
  const picture = svg("svg", { role: "img", "aria-label": label, height });
  new ResizeObserver(([{ contentRect }]) => {
    const width = Math.round(contentRect.width);
    if (width < 1 || Number(picture.dataset.width) === width) return;
    picture.dataset.width = width;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.replaceChildren(...draw(width));
  }).observe(picture);
  return picture;
}

function stageChart(times, stages) {
  const value = ([, stage]) => stage.wall_ms / stage.pictures;
  const most = Math.max(...stages.map(value), 0.001);
  const slowest = stages.reduce((a, b) => (value(a) > value(b) ? a : b));
  const label = `Time per picture in each stage. The longest is ${STAGES[slowest[0]] ?? slowest[0]} with ${ms(value(slowest))}.`;
  const picture = fitting(stages.length * ROW_PX + 4, label, (width) =>
    stages.map((entry, row) => {
      const [name] = entry;
      const y = row * ROW_PX + 2;
      const long = Math.max((value(entry) / most) * (width - NAME_PX - FIGURE_PX), 1);
      return svg(
        "g",
        {},
        svg("text", { class: "name", x: 0, y: y + 13 }, STAGES[name] ?? name),
        svg("rect", { class: "bar-work", x: NAME_PX, y, width: long, height: BAR_PX, rx: 3 }),
        svg("text", { x: NAME_PX + long + 8, y: y + 13 }, ms(value(entry))),
      );
    }),
  );
  const head = ["Stage", "per picture", "CPU per picture", "in all", "waited"];
  const body = stages.map(([name, stage]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, STAGES[name] ?? name),
      ...[stage.wall_ms / stage.pictures, stage.cpu_ms / stage.pictures, stage.wall_ms, stage.waiting_ms].map((v) => h("td", {}, ms(v))),
    ),
  );
  const table = h(
    "table",
    {},
    h("thead", {}, h("tr", {}, ...head.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...body),
  );
  const speed = `${times.pictures_per_s.toFixed(1)} pictures a second in all; the stages work at the same time.`;
  return h(
    "figure",
    { class: "chart", id: "chart-stages" },
    h("figcaption", {}, "Time per picture, by stage"),
    picture,
    h("p", { class: "hint" }, speed),
    h("details", {}, h("summary", {}, "As a table"), h("div", { class: "scroll" }, table)),
  );
}

function mouthChart({ step_s, opening, loudness_db }, onSeek) {
  const height = 190;
  const [left, top, bottom] = [2, 8, height - 22];
  const length_s = opening.length * step_s;
  const most = Math.max(...opening, 0.05);
  const heard = loudness_db.map((db) => Math.min(Math.max((db + 60) / 60, 0), 1));
  const agrees = correlation(opening, heard);
  const label =
    `Mouth opening and loudness over ${length_s.toFixed(1)} seconds. ` +
    `The opening reaches ${most.toFixed(2)} mouth widths` +
    (agrees === null ? "." : `; its correlation with the loudness is ${agrees.toFixed(2)}.`);
  const head = svg("line", { class: "playhead", y1: top, y2: bottom, visibility: "hidden" });
  let right = left + 1;
  let shown_s = 0;
  const place = () => {
    const where = left + Math.min(shown_s / length_s, 1) * (right - left);
    head.setAttribute("x1", where);
    head.setAttribute("x2", where);
  };
  const picture = fitting(height, label, (width) => {
    right = width - 2;
    place();
    const x = (index) => left + ((index + 0.5) / opening.length) * (right - left);
    const y = (share) => bottom - share * (bottom - top);
    const path = (shares) => shares.map((share, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(share).toFixed(1)}`).join("");
    const most_marks = Math.max(3, width / 70);
    const every_s = [0.5, 1, 2, 5, 10, 30, 60, 120].find((s) => length_s / s <= most_marks) ?? 300;
    const marks = [];
    for (let s = 0; s <= length_s; s += every_s) {
      const at = left + (s / length_s) * (right - left);
      const anchor = at > right - 20 ? "end" : s ? "middle" : "start";
      marks.push(
        svg("line", { class: "grid", x1: at, x2: at, y1: top, y2: bottom }),
        svg("text", { x: at, y: height - 6, "text-anchor": anchor }, length_s < 60 ? `${s} s` : clock(s)),
      );
    }
    return [
      ...marks,
      svg("path", { class: "loudness", d: `${path(heard)}L${right} ${bottom}L${left} ${bottom}Z` }),
      svg("path", { class: "opening", d: path(opening.map((v) => v / most)) }),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      head,
    ];
  });
  picture.addEventListener("click", (event) => {
    const { left: from, width } = picture.getBoundingClientRect();
    onSeek(Math.min(Math.max((event.clientX - from) / width, 0), 1) * length_s);
  });
  const swatch = (inner) => svg("svg", { viewBox: "0 0 28 12", "aria-hidden": "true" }, inner);
  const opened = swatch(svg("path", { class: "opening", d: "M1 9L9 3L18 8L27 3" }));
  const loud = swatch(svg("path", { class: "loudness", d: "M1 11L9 3L18 7L27 2L27 11Z" }));
  const figure = h(
    "figure",
    { class: "chart", id: "chart-mouth" },
    h("figcaption", {}, "Mouth opening against loudness"),
    picture,
    h(
      "ul",
      { class: "legend" },
      h("li", {}, opened, `mouth opening, up to ${most.toFixed(2)} mouth widths (line)`),
      h("li", {}, loud, "loudness, −60 to 0 dB (area)"),
    ),
  );
  const at = (time_s) => {
    shown_s = time_s;
    head.setAttribute("visibility", "visible");
    place();
  };
  return { figure, at };
}

function correlation(a, b) {
  const n = Math.min(a.length, b.length);
  const mean = (v) => v.slice(0, n).reduce((sum, x) => sum + x, 0) / n;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < n; i += 1) {
    ab += (a[i] - ma) * (b[i] - mb);
    aa += (a[i] - ma) ** 2;
    bb += (b[i] - mb) ** 2;
  }
  return aa > 0 && bb > 0 ? ab / Math.sqrt(aa * bb) : null;
}
