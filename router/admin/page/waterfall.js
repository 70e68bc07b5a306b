/** When each stage of a request began and ended, as bars below each other. */

import { KeyedList, stamp } from "./dom.js";
import { duration } from "./format.js";

/** A stage is `{ name, kind, start_s, end_s }`, in seconds from when the request came; `kind` is its colour. */
export class Waterfall {
  constructor(parent, label) {
    const list = document.createElement("ol");
    list.className = "waterfall";
    list.setAttribute("aria-label", label);
    parent.append(list);
    this.list = list;
    this.rows = new KeyedList(list, (stage) => stage.name, () => new StageRow());
  }

  update(stages) {
    this.list.hidden = !stages.length;
    const total_s = Math.max(...stages.map((stage) => stage.end_s), 1e-9);
    this.rows.update(stages.map((stage) => ({ ...stage, total_s })));
  }
}

class StageRow {
  constructor() {
    Object.assign(this, stamp("stage"));
  }

  update(stage) {
    const { fields } = this;
    const length_s = stage.end_s - stage.start_s;
    fields.text("name", stage.name);
    fields.text("time", duration(length_s));
    fields.attribute("time", "title", `from ${duration(stage.start_s)} to ${duration(stage.end_s)}`);
    fields.attribute("bar", "data-kind", stage.kind);
    fields.property("bar", "--start", (stage.start_s / stage.total_s).toFixed(4));
    fields.property("bar", "--length", (length_s / stage.total_s).toFixed(4));
  }
}
