/** The page's elements. Nothing is written that stays the same: that is what keeps 100 workers cheap. */

/** Copies of a template's content, and of the page's own named elements: name -> element. */
export class Fields {
  #values = new Map(); // what was written, so that the document need not be asked

  /** @param {ParentNode} root whose `data-field`s are meant */
  constructor(root) {
    this.elements = new Map([...root.querySelectorAll("[data-field]")].map((each) => [each.dataset.field, each]));
  }

  element(name) {
    return this.elements.get(name);
  }

  text(name, value) {
    if (this.#isNew(`text ${name}`, value)) this.element(name).textContent = value;
  }

  attribute(name, key, value) {
    if (this.#isNew(`${key} ${name}`, value)) this.element(name).setAttribute(key, value);
  }

  shown(name, isShown) {
    if (this.#isNew(`shown ${name}`, isShown)) this.element(name).hidden = !isShown;
  }

  /** A custom property of the style, such as `--share`. */
  property(name, key, value) {
    if (this.#isNew(`${key} ${name}`, value)) this.element(name).style.setProperty(key, value);
  }

  #isNew(key, value) {
    if (this.#values.get(key) === value) return false;
    this.#values.set(key, value);
    return true;
  }
}

/** A copy of a template: its outermost element and its fields. */
export function stamp(templateId) {
  const copy = document.getElementById(templateId).content.cloneNode(true);
  return { root: copy.firstElementChild, fields: new Fields(copy) };
}

/**
 * Lists that follow data: one element per item, kept as long as the item is there.
 * `make(item)` gives an object with `root` and `update(item)`.
 */
export class KeyedList {
  #views = new Map();

  constructor(parent, key, make) {
    this.parent = parent;
    this.key = key;
    this.make = make;
  }

  update(items) {
    const wanted = new Set(items.map(this.key));
    for (const [key, view] of this.#views) {
      if (wanted.has(key)) continue;
      view.root.remove();
      this.#views.delete(key);
    }
    items.forEach((item, index) => this.#place(item, index));
  }

  #place(item, index) {
    const key = this.key(item);
    if (!this.#views.has(key)) this.#views.set(key, this.make(item));
    const view = this.#views.get(key);
    view.update(item);
    const there = this.parent.children[index];
    if (there !== view.root) this.parent.insertBefore(view.root, there ?? null);
  }
}
