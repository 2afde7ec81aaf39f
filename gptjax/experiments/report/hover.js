
// Shows the values of all runs at the step under the pointer. Texts go in as text, never as HTML.
"use strict";
const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
const LEFT = 0.1, RIGHT = 0.98; // of the axes in a chart, as charts.py places them

function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= wanted) low = middle; else high = middle;
  }
  return wanted - steps[low] <= steps[high] - wanted ? low : high;
}

function made(parent, tag, name) {
  const element = document.createElement(tag);
  element.className = name;
  parent.append(element);
  return element;
}

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const plot = figure.querySelector(".plot"), chart = charts[figure.dataset.chart];
  let line = null, tip = null;
  const leave = () => { line?.remove(); tip?.remove(); line = tip = null; };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    if (share < LEFT || share > RIGHT) { leave(); return; }
    line ??= made(plot, "div", "line");
    tip ??= made(plot, "div", "tip");
    const step = chart.left + (chart.right - chart.left) * (share - LEFT) / (RIGHT - LEFT);
    line.style.left = `${100 * share}%`;
    tip.replaceChildren();
    tip.append(`step ${Math.round(step).toLocaleString("en")}`);
    for (const { run, x, y } of chart.series) {
      const at = nearest(x, step), row = made(tip, "div", "");
      made(row, "i", "").style.background = runs[run].colour;
      row.append(`${runs[run].name}: ${y[at]}` + (chart.series.length > 1 ? "" : ` (step ${x[at].toLocaleString("en")})`));
    }
    const right = share > 0.55;
    tip.style.left = right ? "" : `${100 * share + 2}%`;
    tip.style.right = right ? `${100 * (1 - share) + 2}%` : "";
  });
}
