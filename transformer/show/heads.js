"use strict";
// The page of attention heads. #data holds the labels, the weights (a byte each, 255 is 1) and what to show first.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const FAINTEST = 5; // of 255: a link below 2 % would not be seen
  const MOST = 4000; // links drawn at once; of more the strongest
  const NAMES = {
    all: "All", encoder_self: "Input - Input", encoder_decoder: "Input - Output", decoder_self: "Output - Output",
  };

  // ------------------------------------------------------------ weights

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const maps = {};
  for (const [kind, { layers, heads, rows, columns, weights }] of Object.entries(data.kinds)) {
    const flat = bytes(weights);
    const at = (layer, head, row, column) => flat[((layer * heads + head) * rows + row) * columns + column];
    maps[kind] = { layers, heads, rows, columns, at };
  }
  const written = data.target.slice(1), read = data.target.slice(0, -1);
  const sides = {
    encoder_self: ["Input", data.source, "Input", data.source],
    encoder_decoder: ["Output, being written", written, "Input", data.source],
    decoder_self: ["Output, being written", written, "Output, read so far", read],
  };
  const { encoder_self: ours, encoder_decoder: cross, decoder_self: theirs } = maps;
  if (ours && cross && theirs && ours.heads === cross.heads && cross.heads === theirs.heads) {
    const source = data.source.length;
    // The three kinds as blocks of one map. The input never attends to the output.
    const at = (layer, head, row, column) => {
      if (row < source) return column < source ? ours.at(layer, head, row, column) : 0;
      if (column < source) return cross.at(layer, head, row - source, column);
      return theirs.at(layer, head, row - source, column - source);
    };
    const rows = source + written.length, columns = source + read.length;
    maps.all = { layers: Math.min(ours.layers, theirs.layers), heads: ours.heads, rows, columns, at, split: source };
    sides.all = ["Input, then output being written", [...data.source, ...written],
      "Input, then output read so far", [...data.source, ...read]];
  }

  // ------------------------------------------------------------ state

  const view = { ...data.view, on: new Set(data.view.heads), held: null, over: null };
  if (data.view.token !== null) view.held = { side: "left", index: data.view.token };
  const map = () => maps[view.kind];
  const token = () => view.over ?? view.held;
  const shown = () => [...Array(map().heads).keys()].filter((head) => view.on.has(head));
  const color = (head) => (head < 8 ? `var(--head-${head})` : `hsl(${Math.round(head * 137.5) % 360} 60% 50%)`);

  // What stands for a token that could not be seen.
  const visible = (label) => {
    if (label === "") return "(empty)";
    if (/^ +$/.test(label)) return "␣".repeat(label.length);
    return label.replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
  };
  const isolated = (label) => `\u2068${label}\u2069`; // right-to-left tokens leave the sentence around them as it is
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // ------------------------------------------------------------ menus and columns

  function buildMenus() {
    const kinds = Object.keys(NAMES).filter((kind) => maps[kind]);
    $("kind").replaceChildren(...kinds.map((kind) => new Option(NAMES[kind], kind, false, kind === view.kind)));
    $("kind").onchange = () => {
      view.kind = $("kind").value;
      view.held = view.over = null;
      buildView();
    };
    $("layer").onchange = () => {
      view.layer = Number($("layer").value);
      draw();
    };
    $("every").onclick = () => {
      view.on = new Set(Array(map().heads).keys());
      draw();
    };
  }

  function buildView() {
    view.layer = Math.min(view.layer, map().layers - 1);
    const layers = [...Array(map().layers).keys()];
    $("layer").replaceChildren(...layers.map((n) => new Option(String(n), String(n), false, n === view.layer)));
    $("heads").replaceChildren(...[...Array(map().heads).keys()].map(headButton));
    document.documentElement.style.setProperty("--band", map().heads > 8 ? "2px" : "4px");
    const [leftTitle, leftLabels, rightTitle, rightLabels] = sides[view.kind];
    $("left-title").textContent = leftTitle;
    $("right-title").textContent = rightTitle;
    fill("left", leftLabels);
    fill("right", rightLabels);
    draw();
  }

  function headButton(head) {
    const button = make("button", { type: "button", textContent: String(head) });
    button.dataset.head = head;
    button.style.setProperty("--head", color(head));
    button.setAttribute("aria-label", `Head ${head}`);
    const alone = () => {
      view.on = new Set([head]);
      draw();
    };
    button.onclick = (event) => {
      if (event.shiftKey) return alone();
      if (!view.on.delete(head)) view.on.add(head);
      draw();
    };
    button.ondblclick = alone;
    return button;
  }

  function fill(side, labels) {
    const items = labels.map((label, index) => {
      const bands = make("span", { className: "bands" });
      bands.setAttribute("aria-hidden", "true");
      const text = make("bdi", { textContent: visible(label) });
      const button = make("button", { type: "button", title: label, tabIndex: index ? -1 : 0 }, bands, text);
      button.dataset.index = index;
      button.setAttribute("aria-label", `${visible(label)}, ${index + 1} of ${labels.length}`);
      const here = { side, index };
      button.onpointerenter = (event) => event.pointerType === "mouse" && look(here);
      button.onpointerleave = () => look(null);
      button.onfocus = () => button.matches(":focus-visible") && look(here);
      button.onblur = () => look(null);
      button.onclick = () => {
        const same = view.held && view.held.side === side && view.held.index === index;
        view.held = same ? null : here;
        view.over = null;
        draw();
      };
      button.onkeydown = (event) => move(event, side, index);
      const item = make("li", {}, button);
      if (index && index === map().split) item.className = "break";
      return item;
    });
    $(side).replaceChildren(...items);
  }

  function look(here) {
    view.over = here;
    draw();
  }

  function move(event, side, index) {
    const lengths = { left: map().rows, right: map().columns };
    const other = side === "left" ? "right" : "left";
    const targets = {
      ArrowUp: [side, index - 1], ArrowDown: [side, index + 1], Home: [side, 0], End: [side, lengths[side] - 1],
      ArrowLeft: ["left", side === "left" ? index : Math.min(index, lengths.left - 1)],
      ArrowRight: ["right", side === "right" ? index : Math.min(index, lengths[other] - 1)],
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    const [where, to] = targets[event.key];
    const button = buttons(where)[to];
    if (!button) return;
    // One stop of the Tab key a column: the token that was looked at last.
    for (const each of buttons(where)) each.tabIndex = -1;
    button.tabIndex = 0;
    button.focus();
  }
  const buttons = (side) => [...$(side).querySelectorAll("button")];

  // ------------------------------------------------------------ drawing

  // {head, row, column, weight} of what is to be drawn, the strongest last, and how many there would be.
  function links() {
    const { rows, columns, at } = map(), found = [], one = token();
    const within = (side, count) => (one && one.side === side ? [one.index, one.index + 1] : [0, count]);
    const [fromRow, toRow] = within("left", rows), [fromColumn, toColumn] = within("right", columns);
    for (const head of shown()) {
      for (let row = fromRow; row < toRow; row++) {
        for (let column = fromColumn; column < toColumn; column++) {
          const weight = at(view.layer, head, row, column);
          if (weight >= FAINTEST) found.push({ head, row, column, weight });
        }
      }
    }
    found.sort((a, b) => a.weight - b.weight);
    return { drawn: found.slice(-MOST), count: found.length };
  }

  function draw() {
    for (const button of $("heads").children) {
      button.setAttribute("aria-pressed", String(view.on.has(Number(button.dataset.head))));
    }
    document.documentElement.style.setProperty("--bands", shown().length);
    const found = links();
    drawTokens();
    drawLinks(found.drawn);
    $("status").textContent = describe(found);
  }

  function drawLinks(drawn) {
    const svg = $("links"), frame = svg.getBoundingClientRect();
    const middle = (side) => buttons(side).map((button) => {
      const box = button.parentElement.getBoundingClientRect();
      return (box.top + box.bottom) / 2 - frame.top;
    });
    const left = middle("left"), right = middle("right");
    const height = Math.max(left.at(-1) ?? 0, right.at(-1) ?? 0) + 14;
    svg.style.height = `${height}px`;
    const heads = shown(), lane = Math.min(2.4, 14 / heads.length);
    const lines = drawn.map(({ head, row, column, weight }) => {
      const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      const shift = (heads.indexOf(head) - (heads.length - 1) / 2) * lane;
      const ends = { x1: 4, y1: left[row] + shift, x2: frame.width - 4, y2: right[column] + shift };
      for (const [name, value] of Object.entries(ends)) line.setAttribute(name, value.toFixed(1));
      line.setAttribute("stroke-width", Math.min(2.6, lane + 0.6).toFixed(1));
      line.style.stroke = color(head);
      line.style.opacity = (weight / 255).toFixed(3);
      Object.assign(line.dataset, { head, row, column });
      return line;
    });
    svg.replaceChildren(...lines);
  }

  function drawTokens() {
    const one = token(), heads = shown(), { at } = map();
    for (const side of ["left", "right"]) {
      buttons(side).forEach((button, index) => {
        const own = one !== null && one.side === side;
        const held = view.held !== null && view.held.side === side && view.held.index === index;
        let bands = [], strongest = 255;
        if (one && !own) {
          const [row, column] = side === "right" ? [one.index, index] : [index, one.index];
          const weights = heads.map((head) => at(view.layer, head, row, column));
          strongest = Math.max(...weights, 0);
          bands = weights.map((weight, n) => {
            const band = make("i");
            band.style.background = color(heads[n]);
            band.style.opacity = (weight / 255).toFixed(3);
            return band;
          });
        }
        button.firstChild.replaceChildren(...bands);
        button.classList.toggle("lit", own && one.index === index);
        button.classList.toggle("held", held);
        button.classList.toggle("faint", (own && one.index !== index) || strongest < FAINTEST);
        button.setAttribute("aria-pressed", String(held));
      });
    }
  }

  // What a screen reader says, and everybody reads.
  function describe({ drawn, count }) {
    const heads = shown(), one = token(), [, leftLabels, , rightLabels] = sides[view.kind];
    const some = `${heads.length === 1 ? "head" : "heads"} ${heads.join(", ")}`;
    const which = heads.length > 1 && heads.length === map().heads ? "all heads" : some;
    if (!heads.length) return "No head is shown: choose one.";
    if (!one) {
      const cut = drawn.length < count ? ` The strongest ${drawn.length} of ${count} links are drawn.` : "";
      return `${NAMES[view.kind]}, layer ${view.layer}, ${which}.${cut}`;
    }
    const sums = new Map(), left = one.side === "left", others = left ? rightLabels : leftLabels;
    others.forEach((_, other) => {
      const [row, column] = left ? [one.index, other] : [other, one.index];
      sums.set(other, heads.reduce((sum, head) => sum + map().at(view.layer, head, row, column), 0));
    });
    const means = [...sums].map(([other, sum]) => [other, sum / heads.length]).sort((a, b) => b[1] - a[1]);
    const best = means.filter(([, mean]) => mean >= FAINTEST / 2).slice(0, 5);
    const text = best.map(([other, mean]) => `${isolated(visible(others[other]))} ${Math.round(mean / 2.55)} %`);
    const label = visible((left ? leftLabels : rightLabels)[one.index]);
    const does = left ? "attends to" : "is attended to by";
    const mean = heads.length > 1 ? "mean of " : "";
    return `${isolated(label)} ${does} ${text.join(", ") || "nothing much"} (${mean}${which}).`;
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    view.held = view.over = null;
    draw();
  });
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width === width) return;
    width = contentRect.width;
    draw();
  }).observe(document.querySelector("main"));
  buildMenus();
  buildView();
})();
