"use strict";
// Plays traces of decodes. The page's data (reporting/trace.py) has columns (checkpoints) and prompts with a trace for each column.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const [slider, play, speed, colour, chooser] = ["step", "play", "speed", "colour", "prompt"].map(by);
  let views = [], timer = 0, last = 0;

  const percent = (p) => p >= 0.9995 ? ">99.9%" : p > 0 && p < 0.0005 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;
  const nothing = (text) => text ? "(white space only)" : "(empty)";
  const plural = (n, word, ending = "s") => `${n} ${word}${n === 1 ? "" : ending}`;

  // One column: the canvas of one checkpoint for the chosen prompt.
  class View {
    constructor(column, trace) {
      Object.assign(this, { column, trace });
      this.panel = make("section");
      this.panel.setAttribute("aria-label", column.name);
      this.status = make("p", "status");
      const blocks = make("div", "blocks");
      blocks.setAttribute("role", "group");
      blocks.setAttribute("aria-label", `Response of ${column.name}; arrow keys move from token to token`);
      // A box holds a block of the decoder, or text that was given between spans.
      this.boxOf = trace.boxes.flatMap(([first, end], box) => Array(end - first).fill(box));
      this.boxes = trace.boxes.map(([, , block]) => {
        const box = make("div", "block");
        box.append(make("b", "", block === null ? "given" : `block ${block + 1}`));
        blocks.append(box);
        return box;
      });
      this.tokens = trace.ids.map((id, at) => {
        const token = make("span", "t");
        token.setAttribute("role", "img");
        token.setAttribute("aria-describedby", "tip");
        token.tabIndex = at ? -1 : 0;
        token.dataset.at = at;
        this.boxes[this.boxOf[at]].append(token);
        return token;
      });
      this.inBlock = this.orderInBlock();
      this.answer = make("p", "answer", trace.text.trim() ? trace.text : nothing(trace.text));
      this.panel.append(make("h2", "", column.name), make("p", "", column.settings), this.status, blocks);
      this.panel.append(make("h3", "", "Answer"), this.answer);
      this.listen(blocks);
    }

    // For each position, where its step lies among the steps of its block: 0 for the first, 1 for the last.
    orderInBlock() {
      const { step, boxes } = this.trace;
      return step.map((own, at) => {
        const [first, end] = boxes[this.boxOf[at]], steps = step.slice(first, end).filter((s) => s >= 0);
        const low = Math.min(...steps), high = Math.max(...steps);
        return high > low ? (own - low) / (high - low) : 0;
      });
    }

    listen(blocks) {
      const token = (event) => event.target.closest?.(".t");
      const open = (event) => {
        const found = token(event);
        if (!found) return tip.hide();
        const box = found.getBoundingClientRect();
        tip.show(box.left, box.bottom, (into) => this.describe(Number(found.dataset.at), into));
      };
      blocks.addEventListener("mouseover", open);
      blocks.addEventListener("mouseleave", () => tip.hide());
      blocks.addEventListener("focusin", open);
      blocks.addEventListener("focusout", () => tip.hide());
      blocks.addEventListener("keydown", (event) => {
        const at = Number(token(event)?.dataset.at ?? -1), end = this.tokens.length - 1;
        const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: end, ArrowDown: at + this.column.block, ArrowUp: at - this.column.block }[event.key];
        if (at < 0 || to === undefined) return;
        event.preventDefault();
        event.stopPropagation();
        const next = this.tokens[Math.max(0, Math.min(end, to))];
        this.tokens[at].tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    }

    piece(id) { return this.column.pieces[id] ?? `id ${id}`; }

    isSet(at) { return this.trace.step[at] >= 0 && this.trace.step[at] < this.step; }

    // A token of a text whose spans were filled; the decoder names it so in place of a step.
    isGiven(at) { return this.trace.step[at] === -2; }

    // The first stop token with no mask before it ends the text.
    end() {
      for (let at = 0; at < this.tokens.length && this.isSet(at); at++) if (this.column.stops.includes(this.trace.ids[at])) return at;
      return this.tokens.length;
    }

    show(step, coloured) {
      this.step = Math.min(step, this.trace.steps);
      const over = this.step === this.trace.steps, end = this.end();
      let count = 0, total = 0, fresh = -1;
      this.tokens.forEach((token, at) => {
        const { step: own, ids, probability } = this.trace, set = this.isSet(at), now = set && own[at] === this.step - 1;
        const given = this.isGiven(at), never = !set && !given && over;
        const text = set || given ? this.piece(ids[at]) : never ? "·" : "░░";
        count += set;
        total += !given;
        if (now && fresh < 0) fresh = this.boxOf[at];
        token.textContent = text;
        token.className = `t ${set ? "set" : given ? "given" : never ? "never" : "mask"}${now ? " fresh" : ""}${set && at > end ? " after" : ""}`;
        token.style.setProperty("--value", coloured === "step" ? this.inBlock[at] : probability[at]);
        const what = set ? `${text}, probability ${percent(probability[at])}, step ${own[at] + 1}`
          : given ? `${text}, given` : never ? "never decoded" : "mask";
        token.setAttribute("aria-label", `position ${at + 1}: ${what}`);
      });
      this.boxes.forEach((box, at) => box.classList.toggle("active", at === fresh));
      const passes = this.step * this.column.passes;
      const rate = passes ? `, ${(count / passes).toFixed(2)} per forward pass` : "";
      const stopped = over && this.trace.step.includes(-1) ? ", stopped early" : "";
      this.status.textContent = `${plural(passes, "forward pass", "es")}, ${count} of ${plural(total, "token")}${rate}${stopped}`;
      this.answer.hidden = this.answer.previousSibling.hidden = !over;
    }

    describe(at, box) {
      const { trace, column } = this, [id, own] = [trace.ids[at], trace.step[at]];
      const block = trace.boxes[this.boxOf[at]][2], where = `position ${at + 1}${block === null ? "" : `, block ${block + 1}`}`;
      if (this.isGiven(at)) return box.append(make("b", "", this.piece(id)), ` id ${id}`, make("div", "", `${where}, given`));
      if (!this.isSet(at)) {
        const why = own < 0 && this.step === trace.steps ? "never decoded: the response had ended" : "a mask at this step";
        return box.append(make("b", "", why), make("div", "", where));
      }
      box.append(make("b", "", this.piece(id)), ` id ${id}`, make("div", "", `${where}, committed in step ${own + 1}`));
      const table = make("table"), ids = trace.candidates[at], shares = trace.shares[at];
      const row = (rank, token, p) => {
        const line = table.insertRow();
        line.insertCell().textContent = `${token === id ? "✓ " : ""}${rank}`;
        line.insertCell().textContent = this.piece(token) + (token === column.mask ? " (never committed)" : "");
        line.insertCell().textContent = percent(p);
        line.cells[2].className = "number";
        const bar = make("span", "share");
        bar.style.width = `${Math.max(1, 80 * p)}px`;
        line.insertCell().append(bar);
      };
      ids.forEach((token, rank) => row(rank + 1, token, shares[rank]));
      if (!ids.includes(id)) row("later", id, trace.probability[at]);
      box.append(table);
    }
  }

  const show = (step) => {
    const to = Math.max(0, Math.min(last, step));
    slider.value = to;
    slider.setAttribute("aria-valuetext", `step ${to} of ${last}`);
    by("at").textContent = `step ${to} of ${last}`;
    tip.hide();
    views.forEach((view) => view.show(to, colour.value));
  };
  const step = () => Number(slider.value);

  const pause = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  };
  const start = () => {
    pause();
    if (step() >= last) show(0);
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    timer = setInterval(() => { show(step() + 1); if (step() >= last) pause(); }, 1000 / Number(speed.value));
  };

  const choose = (at) => {
    const to = Math.max(0, Math.min(data.prompts.length - 1, at)), prompt = data.prompts[to];
    pause();
    chooser.value = to;
    by("before").disabled = to === 0;
    by("next").disabled = to === data.prompts.length - 1;
    by("question").textContent = prompt.text.trim() ? prompt.text : nothing(prompt.text);
    views = prompt.traces.map((trace, column) => new View(data.columns[column], trace));
    by("columns").replaceChildren(...views.map((view) => view.panel));
    last = Math.max(...prompt.traces.map((trace) => trace.steps));
    slider.max = last;
    show(last);
  };

  data.prompts.forEach((prompt, at) => chooser.add(new Option(`${at + 1}: ${prompt.text.trim().split("\n").at(-1).slice(0, 60) || nothing(prompt.text)}`, at)));
  chooser.addEventListener("change", () => choose(Number(chooser.value)));
  by("before").addEventListener("click", () => choose(Number(chooser.value) - 1));
  by("next").addEventListener("click", () => choose(Number(chooser.value) + 1));
  slider.addEventListener("input", () => { pause(); show(step()); });
  play.addEventListener("click", () => (timer ? pause() : start()));
  speed.addEventListener("change", () => { if (timer) start(); });
  colour.addEventListener("change", () => {
    document.body.classList.toggle("by-step", colour.value === "step");
    by("low").textContent = colour.value === "step" ? "first step of the block" : "0%";
    by("high").textContent = colour.value === "step" ? "last step" : "100%: probability of the token";
    show(step());
  });
  const keys = {
    ArrowRight: () => { pause(); show(step() + 1); }, ArrowLeft: () => { pause(); show(step() - 1); },
    Home: () => { pause(); show(0); }, End: () => { pause(); show(last); }, " ": () => play.click(),
    c: () => { colour.value = colour.value === "step" ? "probability" : "step"; colour.dispatchEvent(new Event("change")); },
    n: () => choose(Number(chooser.value) + 1), p: () => choose(Number(chooser.value) - 1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
    const tag = event.target.tagName;
    if (tag === "SELECT" || (tag === "BUTTON" && event.key === " ") || (tag === "SUMMARY" && event.key === " ")) return;
    event.preventDefault();
    keys[event.key]();
  });
  choose(0);
})();
