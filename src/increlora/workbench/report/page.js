"use strict";

// Vega's expressions are interpreted (`ast`), so that the page needs no `eval` and its policy can forbid it.
const OPTIONS = { renderer: "svg", actions: false, ast: true, tooltip: { theme: "none" } };

const root = document.documentElement;

async function drawAll() {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  for (const place of document.querySelectorAll("[data-chart]")) {
    try {
      await vegaEmbed(place, charts[place.dataset.chart], OPTIONS);
      place.querySelectorAll(".vega-bind").forEach(addPlay);
    } catch (error) {
      place.textContent = `This figure could not be drawn: ${error}`;
      console.error(error);
    }
    await new Promise((done) => setTimeout(done)); // show each figure as soon as it is there
  }
  root.dataset.drawn = "all";
}

// A button beside a slider that moves it from start to end in about four seconds.
function addPlay(bind) {
  const range = bind.querySelector("input[type=range]");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "play";
  let timer = null;
  const move = (value) => {
    range.value = value;
    range.dispatchEvent(new Event("input"));
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "play";
  };
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    const stride = Math.max(1, Math.round((range.max - range.min) / 80));
    if (range.value === range.max) move(range.min);
    button.textContent = "stop";
    timer = setInterval(() => {
      move(Math.min(Number(range.max), Number(range.value) + stride));
      if (range.value === range.max) stop();
    }, 50);
  });
  bind.append(button);
}

document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

drawAll();
