/** When each stage of a request began and ended. A stage is `{ name, kind, start_s, end_s }`, in seconds from when
 * the request came; `kind` is its colour. */

import { KeyedList, stamp } from "./dom.js";
import { duration } from "./format.js";

/** Bars below each other, with names and times. */
export class Waterfall {
  /** Without stages `parent` is hidden. */
  constructor(parent, label) {
    this.parent = parent;
    const list = document.createElement("ol");
    list.className = "waterfall";
    list.setAttribute("aria-label", label);
    parent.append(list);
    this.rows = new KeyedList(list, (stage) => stage.name, () => new StageRow());
  }

  update(stages) {
    this.parent.hidden = !stages.length;
    this.rows.update(withTotal(stages));
  }
}

/** All bars in one line; for the eye only. */
export class Timeline {
  constructor(parent) {
    this.bars = new KeyedList(parent, (stage) => stage.name, () => new Bar(stamp("bar")));
  }

  update(stages) {
    this.bars.update(withTotal(stages));
  }
}

class StageRow {
  constructor() {
    Object.assign(this, stamp("stage"));
    this.bar = new Bar(this);
  }

  update(stage) {
    this.fields.text("name", stage.name);
    this.fields.text("time", duration(stage.end_s - stage.start_s));
    this.fields.attribute("time", "title", `from ${duration(stage.start_s)} to ${duration(stage.end_s)}`);
    this.bar.update(stage);
  }
}

class Bar {
  constructor({ root, fields }) {
    this.root = root;
    this.fields = fields;
  }

  update({ kind, start_s, end_s, total_s }) {
    this.fields.attribute("bar", "data-kind", kind);
    this.fields.property("bar", "--start", (start_s / total_s).toFixed(4));
    this.fields.property("bar", "--length", ((end_s - start_s) / total_s).toFixed(4));
  }
}

function withTotal(stages) {
  const total_s = Math.max(...stages.map((stage) => stage.end_s), 1e-9);
  return stages.map((stage) => ({ ...stage, total_s }));
}
