"use strict";
// Draws the curves of a run's page: values under the pointer or by arrow keys, linear or logarithmic. The data: reporting/report.py.
(() => {
  const WIDTH = 460, HEIGHT = 280, LEFT = 66, RIGHT = 14, TOP = 12, BOTTOM = 44;
  const SVG = "http://www.w3.org/2000/svg";
  const shape = (tag, kind, places) => {
    const element = document.createElementNS(SVG, tag);
    if (kind) element.setAttribute("class", kind);
    Object.entries(places).forEach(([name, value]) => element.setAttribute(name, value));
    return element;
  };
  const number = (value) => {
    if (value !== 0 && (Math.abs(value) < 1e-5 || Math.abs(value) >= 1e9)) return value.toExponential(2);
    return value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
  };

  // Places of about `count` round numbers between two ends.
  const roundTicks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
    return found;
  };
  const logTicks = (low, high) => {
    const found = [], decades = Math.log10(high / low), parts = decades < 2.5 ? [1, 2, 5] : [1];
    const stride = Math.max(1, Math.ceil(decades / 6));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += stride)
      parts.forEach((part) => { const at = part * 10 ** power; if (at >= low * 0.999 && at <= high * 1.001) found.push(at); });
    return found;
  };

  class Chart {
    constructor(figure, panel) {
      Object.assign(this, { figure, panel, log: panel.log, at: -1 });
      const values = panel.lines.flatMap((line) => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]);
      const xs = [...new Set(panel.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      Object.assign(this, { values, xs, indices: panel.lines.map((line) => new Map(line.x.map((x, at) => [x, at]))) });
      const heading = figure.querySelector("figcaption");
      if (Math.min(...values) > 0) {
        const toggle = make("button");
        toggle.type = "button";
        const label = () => { toggle.textContent = this.log ? "linear scale" : "log scale"; };
        toggle.addEventListener("click", () => { this.log = !this.log; label(); this.draw(); });
        label();
        heading.append(toggle);
      }
      this.holder = make("div");
      figure.append(this.holder, this.keys(), this.table());
      this.draw();
    }

    keys() {
      const keys = make("div");
      if (this.panel.lines.length > 1)
        this.panel.lines.forEach((line, at) => {
          const key = make("span", "key"), box = shape("svg", "", { viewBox: "0 0 12 12", "aria-hidden": "true" });
          box.append(shape("rect", `swatch ${this.colour(at)}`, { width: 12, height: 12, rx: 2 }));
          key.append(box, line.name);
          keys.append(key);
        });
      return keys;
    }

    // The values as a table, for whoever cannot see or point; it is made when it is opened.
    table() {
      const details = make("details");
      details.append(make("summary", "", "values"));
      details.addEventListener("toggle", () => {
        if (!details.open || details.querySelector("table")) return;
        const table = make("table"), head = table.createTHead().insertRow();
        [this.panel.x, ...this.panel.lines.map((line) => line.name)].forEach((name) => head.append(make("th", "", name)));
        this.xs.forEach((x) => {
          const row = table.insertRow();
          row.insertCell().textContent = number(x);
          this.panel.lines.forEach((line, at) => { row.insertCell().textContent = this.value(line, this.indices[at].get(x)); });
        });
        details.append(table);
      });
      return details;
    }

    colour(at) {
      const line = this.panel.lines[at];
      return line.tone === "pale" ? "behind" : `c${this.panel.lines.slice(0, at).filter((other) => other.tone !== "pale").length}`;
    }

    write(value) { return this.panel.percent ? `${(100 * value).toFixed(1)}%` : number(value); }

    value(line, at) {
      if (at === undefined) return "";
      return this.write(line.y[at]) + (line.low ? ` [${this.write(line.low[at])}, ${this.write(line.high[at])}]` : "");
    }

    ends() {
      let low = Math.min(...this.values), high = Math.max(...this.values);
      if (this.log) return [low / 1.15, high * 1.15];
      const [least, most] = this.panel.limits, room = (high - low || Math.abs(high) || 1) * 0.05;
      low = least ?? low - room;
      high = most ?? high + room;
      return low < high ? [low, high] : [low - 1, high + 1];
    }

    draw() {
      const { xs, panel } = this, [low, high] = this.ends(), right = WIDTH - RIGHT, bottom = HEIGHT - BOTTOM;
      const first = xs[0], last = xs.at(-1) > first ? xs.at(-1) : first + 1, scale = this.log ? Math.log : (v) => v;
      this.x = (value) => LEFT + ((value - first) / (last - first)) * (right - LEFT);
      this.y = (value) => bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (bottom - TOP);
      const svg = shape("svg", "", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img", "aria-label": this.summary() });
      (this.log ? logTicks(low, high) : roundTicks(low, high, 7)).forEach((value) => {
        svg.append(shape("line", "grid", { x1: LEFT, x2: right, y1: this.y(value), y2: this.y(value) }));
        const text = shape("text", "", { x: LEFT - 6, y: this.y(value) + 4, "text-anchor": "end" });
        text.textContent = panel.percent ? `${Math.round(100 * value)}%` : number(value);
        svg.append(text);
      });
      roundTicks(first, last, 5).filter(Number.isInteger).forEach((value) => {
        const text = shape("text", "", { x: this.x(value), y: bottom + 16, "text-anchor": "middle" });
        text.textContent = number(value);
        svg.append(text);
      });
      const labels = [shape("text", "", { x: (LEFT + right) / 2, y: HEIGHT - 8, "text-anchor": "middle" }),
        shape("text", "", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${(TOP + bottom) / 2}) rotate(-90)` })];
      labels[0].textContent = panel.x;
      labels[1].textContent = `${panel.y}, ${this.log ? "log" : "linear"} scale`;
      svg.append(...labels, shape("line", "axis", { x1: LEFT, x2: right, y1: bottom, y2: bottom }));
      panel.lines.forEach((line, at) => this.drawLine(svg, line, this.colour(at)));
      this.cross = shape("g", "", {});
      svg.append(this.cross);
      this.listen(svg);
      this.holder.replaceChildren(svg);
    }

    drawLine(svg, line, colour) {
      const path = (values, order = line.x.map((_, at) => at)) => order.map((at) => `${this.x(line.x[at]).toFixed(1)},${this.y(values[at]).toFixed(1)}`).join(" ");
      if (line.low && !line.marked) {
        const back = line.x.map((_, at) => line.x.length - 1 - at);
        svg.append(shape("polygon", `range ${colour}`, { points: `${path(line.low)} ${path(line.high, back)}` }));
      }
      svg.append(shape("polyline", `curve ${colour}${line.tone === "pale" ? " pale" : ""}`, { points: path(line.y) }));
      if (!line.marked) return;
      line.x.forEach((x, at) => {
        if (line.low) svg.append(shape("line", `bar ${colour}`, { x1: this.x(x), x2: this.x(x), y1: this.y(line.low[at]), y2: this.y(line.high[at]) }));
        svg.append(shape("circle", `dot ${colour}`, { cx: this.x(x), cy: this.y(line.y[at]), r: 3.2 }));
      });
    }

    summary() {
      const parts = this.panel.lines.map((line) => `${line.name}: ${this.value(line, 0)} at ${number(line.x[0])}, ${this.value(line, line.x.length - 1)} at ${number(line.x.at(-1))}`);
      return `${this.panel.title}. ${parts.join(". ")}. Arrow keys read the values.`;
    }

    listen(svg) {
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * WIDTH;
        let best = 0;
        this.xs.forEach((x, index) => { if (Math.abs(this.x(x) - at) < Math.abs(this.x(this.xs[best]) - at)) best = index; });
        this.point(svg, best);
      });
      svg.addEventListener("pointerleave", () => this.leave());
      svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) this.point(svg, this.at < 0 ? this.xs.length - 1 : this.at); });
      svg.addEventListener("blur", () => this.leave());
      svg.addEventListener("keydown", (event) => {
        const end = this.xs.length - 1, stride = event.shiftKey ? 10 : 1;
        const to = { ArrowRight: this.at + stride, ArrowLeft: this.at - stride, Home: 0, End: end }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        this.point(svg, Math.max(0, Math.min(end, to)));
      });
    }

    leave() {
      this.cross.replaceChildren();
      tip.hide();
    }

    point(svg, at) {
      this.at = at;
      const x = this.xs[at], place = this.x(x), box = svg.getBoundingClientRect();
      this.cross.replaceChildren(shape("line", "cross", { x1: place, x2: place, y1: TOP, y2: HEIGHT - BOTTOM }));
      const rows = [];
      this.panel.lines.forEach((line, index) => {
        const own = this.indices[index].get(x);
        if (own === undefined) return;
        this.cross.append(shape("circle", `dot ${this.colour(index)}`, { cx: place, cy: this.y(line.y[own]), r: 4.5 }));
        rows.push([line.name, this.value(line, own)]);
      });
      const said = rows.map((row) => row.join(" ")).join(", ");
      by("said").textContent = `${this.panel.place} ${number(x)}: ${said}`;
      tip.show(box.left + (place / WIDTH) * box.width + 10, box.top + box.height * 0.35, (into) => {
        into.append(make("b", "", `${this.panel.place} ${number(x)}`));
        const table = make("table");
        rows.forEach(([name, value]) => {
          const row = table.insertRow();
          row.insertCell().textContent = name;
          row.insertCell().textContent = value;
        });
        into.append(table);
      });
    }
  }

  const by = (id) => document.getElementById(id);
  const data = JSON.parse(by("data").textContent);
  data.panels.forEach((panel) => new Chart(by(`panel-${panel.key}`), panel));
})();
