"use strict";
// Shows a box of details beside an element; `fill` writes into it.
const tip = (() => {
  const box = document.createElement("div");
  box.className = "tip";
  box.id = "tip";
  box.setAttribute("role", "tooltip");
  box.hidden = true;
  document.body.append(box);
  const show = (x, y, fill) => {
    box.replaceChildren();
    fill(box);
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(x, innerWidth - width - 4))}px`;
    box.style.top = `${y + height + 14 > innerHeight ? Math.max(4, y - height - 30) : y + 8}px`;
  };
  const hide = () => { box.hidden = true; };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  return { show, hide };
})();

// Makes an element: `make("b", "status", "text")`.
const make = (tag, kind = "", text = "") => {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  return element;
};
