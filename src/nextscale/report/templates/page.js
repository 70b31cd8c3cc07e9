"use strict";
// The page is whole without this: it lays the two grids over each other.
const pair = document.getElementById("pair");
const controls = document.getElementById("controls");
if (pair && controls) {
  const button = document.getElementById("wipe");
  const label = document.getElementById("at-label");
  const at = document.getElementById("at");
  const move = () => pair.style.setProperty("--at", `${at.value}%`);
  button.addEventListener("click", () => {
    const isOver = pair.classList.toggle("wiping");
    button.setAttribute("aria-pressed", String(isOver));
    button.textContent = isOver ? "Lay them side by side" : "Lay one over the other";
    label.hidden = !isOver;
    move();
    if (isOver) at.focus();
  });
  at.addEventListener("input", move);
  controls.hidden = false;
}
