"use strict";
// One tooltip for all cells of all maps: by pointer, by touch and by arrow keys.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);
  let shown = null;

  function hide() {
    if (shown) shown.removeAttribute("aria-describedby");
    shown = null;
    tip.hidden = true;
  }

  function show(cell) {
    hide();
    shown = cell;
    tip.textContent = cell.dataset.tip;
    tip.hidden = false;
    cell.setAttribute("aria-describedby", "tip");
    const at = cell.getBoundingClientRect();
    const left = at.left + at.width / 2 - tip.offsetWidth / 2;
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (above < 8 ? at.bottom + 6 : above) + "px";
  }

  function neighbour(cell, key) {
    const across = { ArrowLeft: -1, ArrowRight: 1 }[key] || 0;
    const down = { ArrowUp: -1, ArrowDown: 1 }[key] || 0;
    const rows = cell.closest("tbody").rows;
    let row = cell.parentElement.sectionRowIndex + down;
    let column = cell.cellIndex + across;
    while (row >= 0 && row < rows.length && column >= 1) {
      const cells = rows[row].cells;
      const next = cells[Math.min(column, cells.length - 1)];
      if (across && column >= cells.length) return null;
      if (next.dataset.tip) return next;
      row += down;
      column += across;
    }
    return null;
  }

  for (const map of document.querySelectorAll("table.map")) {
    map.setAttribute("role", "grid");
    const cells = map.querySelectorAll("td[title]");
    for (const cell of cells) {
      // The browser's own tooltip, which is there without this script, would cover ours.
      cell.dataset.tip = cell.title;
      cell.removeAttribute("title");
      cell.tabIndex = -1;
    }
    const entry = map.querySelector("td.first") || cells[0];
    if (entry) entry.tabIndex = 0;
    map.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td[data-tip]");
      if (cell) show(cell); else hide();
    });
    map.addEventListener("pointerleave", hide);
    map.addEventListener("focusin", (event) => {
      if (event.target.dataset.tip) show(event.target);
    });
    map.addEventListener("focusout", hide);
    map.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td[data-tip]");
      const next = cell && neighbour(cell, event.key);
      if (!next) return;
      event.preventDefault();
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });
  document.addEventListener("scroll", hide, { capture: true, passive: true });
})();
