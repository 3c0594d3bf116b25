"use strict";
const tip = document.getElementById("tip");
const show = (value, percent) => (percent ? (100 * value).toPrecision(3) + " %" : String(value));

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
}

for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const plot = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - chart.box[0]) / (chart.box[1] - chart.box[0]);
    if (share < 0 || share > 1) return hide();
    const x = nearest(chart.s[0].p, chart.x[0] + share * (chart.x[1] - chart.x[0]))[0];
    const at = (chart.box[0] + (x - chart.x[0]) / (chart.x[1] - chart.x[0]) * (chart.box[1] - chart.box[0])) * plot.viewBox.baseVal.width;
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.visibility = "visible";
    const head = document.createElement("b");
    head.textContent = chart.label + " " + x;
    tip.replaceChildren(head, ...chart.s.map((series) => {
      const row = document.createElement("div"), mark = document.createElement("i");
      mark.style.background = `var(--${series.c})`;
      row.append(mark, `${series.n} ${show(nearest(series.p, x)[1], chart.pct)}`);
      return row;
    }));
    tip.hidden = false;
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = left + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
}

const bar = document.querySelector(".filter");
if (bar) {
  bar.hidden = false;
  bar.addEventListener("click", (event) => {
    const kind = event.target.dataset.show;
    if (kind === undefined) return;
    for (const button of bar.children) button.classList.toggle("on", button === event.target);
    for (const card of document.querySelectorAll(".card")) card.hidden = kind !== "" && card.dataset.kind !== kind;
  });
}
