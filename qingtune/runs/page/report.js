"use strict";
// The language that was chosen last, else the browser's; the switch itself is CSS and works without this.
const keptLanguage = (() => { try { return localStorage.getItem("qingtune-language"); } catch { return null; } })();
function speak(language) {
  document.getElementById(`choose-${language}`).checked = true;
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}
speak(keptLanguage === "zh" || keptLanguage === "en" ? keptLanguage : /^zh/i.test(navigator.language) ? "zh" : "en");
for (const choice of document.querySelectorAll(".choice")) {
  choice.addEventListener("change", () => {
    const language = choice.id.slice("choose-".length);
    speak(language);
    try { localStorage.setItem("qingtune-language", language); } catch { /* not kept, then */ }
  });
}

// Values under the pointer: the nearest step of each line takes the place of the line's last value.
for (const chart of document.querySelectorAll(".chart")) {
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor"), at = chart.querySelector(".at");
  const lines = [...chart.querySelectorAll("[data-points]")].map((path) => JSON.parse(path.dataset.points));
  const outputs = [...chart.querySelectorAll("output")];
  const first = Math.min(...lines.map(([steps]) => steps[0])), last = Math.max(...lines.map(([steps]) => steps.at(-1)));
  const nearest = (steps, wanted) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < wanted) low = middle; else high = middle;
    }
    return wanted - steps[low] <= steps[high] - wanted ? low : high;
  };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = first + share * (last - first);
    const step = lines[0][0][nearest(lines[0][0], wanted)];
    lines.forEach(([steps, values], number) => { outputs[number].textContent = values[nearest(steps, step)]; });
    cursor.style.display = "block";
    cursor.style.left = `${last > first ? (100 * (step - first)) / (last - first) : 50}%`;
    at.textContent = `@ ${step.toLocaleString("en-US")}`;
  };
  const hide = () => {
    for (const output of outputs) output.textContent = output.dataset.last;
    cursor.style.display = "none";
    at.textContent = "";
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}

addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
document.documentElement.dataset.ready = "yes";
