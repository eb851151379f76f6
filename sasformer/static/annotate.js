/* The page of sasformer_annotate. `Stage` is the canvas on which one draws: it knows a photograph's size, asks a
   `source` for pictures of its parts and hands out strokes. `Saver` sends them one after the other. `Page` is all round it. */

const CLASS_KEYS = 9
export const TOOLS = {brush: 'B', line: 'L', point: 'P', eraser: 'E', hand: 'H'}
const clamp = (v, low, high) => Math.min(high, Math.max(low, v))
const colour = rgb => `rgb(${rgb.join(',')})`

/* ---- The canvas ---------------------------------------------------------------------------------------------- */

// A layer shows the whole photograph coarsely and, when that is magnified, the part in view finely
class Layer {
  constructor(stage, name) {
    this.stage = stage
    this.name = name
    this.canvas = stage.element.appendChild(document.createElement('canvas'))
    this.canvas.className = name
    this.context = this.canvas.getContext('2d')
    this.on = true
    this.clear()
  }
  clear() { this.whole = this.part = this.loading = null; this.stale = false; this.asked = (this.asked ?? 0) + 1 }

  // Done when what the view needs is drawn; an answer that comes after a newer question waits for that one's
  load({again = false} = {}) {
    this.stale ||= again   // until new pictures are here, whoever asks for them
    return this.loading = this.fetch()
  }
  async fetch() {
    if (!this.on || !this.stage.photo) return
    const {photo} = this.stage, asked = ++this.asked, again = this.stale
    const all = [0, 0, photo.width, photo.height], scale = Math.min(1, 1600/Math.max(photo.width, photo.height))
    const view = this.stage.visible(), fine = this.stage.source.parts.includes(this.name) && this.stage.density() > 1.05*scale
    const wanted = fine && (again || !this.part || String(view.box) !== String(this.part.box)) ? view : null
    const get = (box, size) => this.stage.source.picture(this.name, box, size).then(image => ({box, image}))
    const [whole, part] = await Promise.all([
      this.whole && !again ? this.whole : get(all, [photo.width, photo.height].map(n => Math.max(1, Math.round(n*scale)))),
      wanted ? get(wanted.box, wanted.size) : fine ? this.part : null])
    if (asked !== this.asked) return this.loading
    Object.assign(this, {whole, part, stale: false})
    this.draw()
  }

  draw() {
    const {stage, context: c} = this
    c.setTransform(1, 0, 0, 1, 0, 0)
    c.clearRect(0, 0, this.canvas.width, this.canvas.height)
    if (!this.on || !stage.photo) return
    stage.toPhoto(c)
    for (const shown of [this.whole, this.part]) {
      if (!shown) continue
      const [x0, y0, x1, y1] = shown.box
      c.imageSmoothingEnabled = this.name === 'photo'
      if (shown === this.part) c.clearRect(x0, y0, x1-x0, y1-y0)
      c.drawImage(shown.image, x0, y0, x1-x0, y1-y0)
    }
    if (this.name === 'labels') for (const s of [...stage.pending, ...(stage.live ? [stage.live] : [])]) stage.sketch(s)
  }
}

export class Stage {
  constructor(element, source, {onStroke, onView = () => {}, limits}) {
    Object.assign(this, {element, source, onStroke, onView, limits})
    this.tool = 'brush'; this.cls = 0; this.width = 5; this.palette = []
    this.photo = null; this.view = {scale: 1, x: 0, y: 0}
    this.pending = []       // strokes that are drawn and not yet in the pictures of the labels
    this.live = null        // the stroke in hand
    this.pointers = new Map(); this.cursor = null; this.penSeen = false
    element.classList.add('stage')
    element.tabIndex = 0
    element.setAttribute('role', 'application')
    element.setAttribute('aria-label', 'Photograph: draw with the pointer, or with arrow keys and Space')
    this.layers = Object.fromEntries(['photo', 'prediction', 'entropy', 'labels'].map(n => [n, new Layer(this, n)]))
    this.layers.prediction.on = this.layers.entropy.on = false
    this.top = new Layer(this, 'cursor')
    new ResizeObserver(() => this.resize()).observe(element)
    for (const [type, f] of Object.entries({pointerdown: 'down', pointermove: 'move', pointerup: 'up', pointercancel: 'cancel',
      pointerleave: 'leave', dblclick: 'finishLine', wheel: 'wheel', keydown: 'key', contextmenu: 'menu', blur: 'leave'}))
      element.addEventListener(type, e => this[f](e), {passive: false})
  }

  // -- what is seen
  resize() {
    const {width, height} = this.element.getBoundingClientRect(), ratio = devicePixelRatio
    const first = !this.box?.width
    this.box = {width, height}
    for (const l of [...Object.values(this.layers), this.top])
      [l.canvas.width, l.canvas.height] = [Math.round(width*ratio), Math.round(height*ratio)]
    if (first || this.fitted) this.fit()
    else this.moved()
  }
  density() { return this.view.scale*devicePixelRatio }   // pixels of the screen per pixel of the photograph
  toPhoto(c) { const d = this.density(); c.setTransform(d, 0, 0, d, -this.view.x*d, -this.view.y*d) }
  at(e) {
    const r = this.element.getBoundingClientRect()
    return [this.view.x+(e.clientX-r.left)/this.view.scale, this.view.y+(e.clientY-r.top)/this.view.scale]
  }
  visible() {   // the part in view, whole pixels, and its size on the screen
    const {x, y, scale} = this.view, {width, height} = this.photo, d = Math.min(this.density(), 8)
    const box = [clamp(Math.floor(x), 0, width-1), clamp(Math.floor(y), 0, height-1),
      clamp(Math.ceil(x+this.box.width/scale), 1, width), clamp(Math.ceil(y+this.box.height/scale), 1, height)]
    return {box, size: [box[2]-box[0], box[3]-box[1]].map(n => clamp(Math.round(n*d), 1, 4096))}
  }
  show(photo) {
    this.photo = photo; this.live = null; this.pending = []
    for (const l of Object.values(this.layers)) l.clear()
    if (this.box) this.fit()
    else this.resize()   // the observer speaks with the next frame, in a hidden tab not at all
    return Promise.all(Object.values(this.layers).map(l => l.load()))
  }
  fit() {
    if (!this.photo || !this.box?.width) return
    const {width, height} = this.photo
    const scale = Math.min(this.box.width/width, this.box.height/height)*.98
    this.view = {scale, x: (width-this.box.width/scale)/2, y: (height-this.box.height/scale)/2}
    this.fitted = true
    this.moved()
  }
  zoom(factor, at = [this.view.x+this.box.width/2/this.view.scale, this.view.y+this.box.height/2/this.view.scale]) {
    if (!this.photo) return
    const least = Math.min(this.box.width/this.photo.width, this.box.height/this.photo.height)/2
    const scale = clamp(this.view.scale*factor, least, 40), f = this.view.scale/scale
    this.view = {scale, x: at[0]-(at[0]-this.view.x)*f, y: at[1]-(at[1]-this.view.y)*f}
    this.fitted = false
    this.moved()
  }
  pan(dx, dy) {   // pixels of the page; some of the photograph always stays in view
    const {view, photo, box} = this
    view.x = clamp(view.x-dx/view.scale, -.8*box.width/view.scale, photo.width-.2*box.width/view.scale)
    view.y = clamp(view.y-dy/view.scale, -.8*box.height/view.scale, photo.height-.2*box.height/view.scale)
    this.fitted = false
    this.moved()
  }
  moved() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null
      for (const l of Object.values(this.layers)) l.draw()
      this.drawCursor()
    })
    clearTimeout(this.settled)
    this.settled = setTimeout(() => Object.values(this.layers).forEach(l => l.load().catch(() => {})), 120)
    this.onView()
  }

  // -- strokes: drawn here as a preview, by the server for good
  begin(x, y) {
    const {tool, cls} = this
    this.live = {tool, cls: tool === 'eraser' ? 255 : cls, width: this.width, points: []}
    this.extend(x, y)
  }
  extend(x, y) {
    const {points} = this.live, last = points.at(-1)
    const p = [Math.floor(clamp(x, -this.photo.width, 2*this.photo.width-1)), Math.floor(clamp(y, -this.photo.height, 2*this.photo.height-1))]
    if (last && last[0] === p[0] && last[1] === p[1]) return
    points.push(p)
    this.sketch(this.live, Math.max(0, points.length-2))
    const length = points.reduce((sum, q, i) => i ? sum+Math.max(Math.abs(q[0]-points[i-1][0]), Math.abs(q[1]-points[i-1][1])) : 0, 0)
    if (points.length >= this.limits.points/2 || length*this.width > this.limits.work/3) {   // too long for one: it goes on as another
      this.commit()
      this.begin(x, y)
    }
  }
  commit() {
    const stroke = this.live
    this.live = null
    if (!stroke?.points.length) return
    if (this.beside(stroke)) { this.layers.labels.draw(); return this.drawCursor() }
    this.pending.push(stroke)
    this.onStroke(stroke)
    this.drawCursor()
  }
  beside({points, width}) {   // no pixel of the photograph can be in it
    return [this.photo.width, this.photo.height].some((n, k) =>
      points.every(p => p[k] < -width/2) || points.every(p => p[k] > n-1+width/2))
  }
  drop() { this.live = null; this.layers.labels.draw(); this.drawCursor() }
  sketch({tool, cls, width, points}, from = 0) {
    const c = this.layers.labels.context
    this.toPhoto(c)
    c.globalCompositeOperation = tool === 'eraser' ? 'destination-out' : 'source-over'
    c.strokeStyle = c.fillStyle = tool === 'eraser' ? '#000' : colour(this.palette[cls])
    c.lineWidth = Math.max(width, 1/this.density()); c.lineCap = c.lineJoin = 'round'
    c.beginPath()
    const part = points.slice(from)
    c.moveTo(part[0][0]+.5, part[0][1]+.5)
    for (const [x, y] of part.length > 1 ? part.slice(1) : part) c.lineTo(x+.5, y+.5)
    c.stroke()
    c.globalCompositeOperation = 'source-over'
  }
  drawCursor() {
    const c = this.top.context
    c.setTransform(1, 0, 0, 1, 0, 0)
    c.clearRect(0, 0, this.top.canvas.width, this.top.canvas.height)
    if (!this.cursor || !this.photo || this.tool === 'hand') return
    this.toPhoto(c)
    const [x, y] = this.cursor.map(v => Math.floor(v)+.5), pixel = 1/this.density()
    if (this.live?.tool === 'line' && this.live.points.length) {   // where the line would go
      const [a, b] = this.live.points.at(-1)
      c.strokeStyle = colour(this.palette[this.cls]); c.lineWidth = Math.max(this.width, pixel); c.lineCap = 'round'
      c.globalAlpha = .5; c.beginPath(); c.moveTo(a+.5, b+.5); c.lineTo(x, y); c.stroke(); c.globalAlpha = 1
    }
    for (const [width, ink] of [[3, '#000'], [1.5, '#fff']]) {
      c.lineWidth = width*pixel*devicePixelRatio; c.strokeStyle = ink
      c.beginPath(); c.arc(x, y, Math.max(this.width/2, 3*pixel), 0, 7); c.stroke()
    }
  }

  // -- pointers: a mouse or pen draws, one finger too unless there is a pen, two fingers move and zoom
  down(e) {
    if (!this.photo) return
    e.preventDefault()
    this.element.focus({preventScroll: true})
    try { this.element.setPointerCapture(e.pointerId) } catch {}
    if (e.pointerType === 'pen') this.penSeen = true
    const moves = e.button === 1 || e.button === 2 || this.tool === 'hand' || e.pointerType === 'touch' && this.penSeen
    this.pointers.set(e.pointerId, {x: e.clientX, y: e.clientY, moves})
    if (this.pointers.size === 2) {
      for (const p of this.pointers.values()) p.moves = true
      if (this.live) this.drop()
      return
    }
    if (moves) return
    this.cursor = this.at(e)
    if (this.live?.tool === 'line' && this.tool === 'line') { this.extend(...this.cursor); this.pressed = [e.clientX, e.clientY]; return }
    this.begin(...this.cursor)
    this.pressed = [e.clientX, e.clientY]
    if (this.tool === 'point') this.commit()
  }
  move(e) {
    const p = this.pointers.get(e.pointerId)
    if (!this.photo) return
    if (p?.moves) return this.gesture(e, p)
    this.cursor = this.at(e)
    if (p && this.live && this.live.tool !== 'line')
      for (const c of e.getCoalescedEvents?.().length ? e.getCoalescedEvents() : [e]) this.extend(...this.at(c))
    this.cursorFrame ??= requestAnimationFrame(() => { this.cursorFrame = null; this.drawCursor() })
  }
  gesture(e, p) {
    const others = [...this.pointers].filter(([id]) => id !== e.pointerId).map(([, o]) => o)
    this.pan((e.clientX-p.x)/this.pointers.size, (e.clientY-p.y)/this.pointers.size)
    if (others.length === 1) {
      const [o] = others, far = (x, y) => Math.hypot(x-o.x, y-o.y)
      const middle = this.at({clientX: (e.clientX+o.x)/2, clientY: (e.clientY+o.y)/2})
      this.zoom(far(e.clientX, e.clientY)/Math.max(1, far(p.x, p.y)), middle)
    }
    p.x = e.clientX; p.y = e.clientY
  }
  up(e) {
    const p = this.pointers.get(e.pointerId)
    this.pointers.delete(e.pointerId)
    if (!p || p.moves || !this.live) return
    if (this.live.tool !== 'line') return this.commit()
    // a line that was dragged is done; one that was clicked goes on from corner to corner
    if (Math.hypot(e.clientX-this.pressed[0], e.clientY-this.pressed[1]) > 4) { this.extend(...this.at(e)); this.commit() }
  }
  cancel(e) { this.pointers.delete(e.pointerId); if (this.live?.tool !== 'line') this.commit() }
  leave(e) { if (!this.pointers.size) { this.cursor = null; this.drawCursor() } }
  finishLine() { if (this.live?.tool === 'line') this.commit() }
  menu(e) { e.preventDefault() }
  wheel(e) {
    e.preventDefault()
    if (this.photo) this.zoom(Math.exp(-clamp(e.deltaY*(e.deltaMode ? 30 : 1), -200, 200)*.003), this.at(e))
  }

  // -- keys, while the photograph has the focus
  key(e) {
    const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}
    if (!this.photo || e.ctrlKey || e.metaKey) return
    if (steps[e.key]) {
      this.cursor ??= [this.view.x+this.box.width/2/this.view.scale, this.view.y+this.box.height/2/this.view.scale]
      const step = Math.max(1, (e.shiftKey ? 40 : 8)/this.view.scale)
      this.cursor = this.cursor.map((v, k) => clamp(v+step*steps[e.key][k], 0, [this.photo.width, this.photo.height][k]-1))
      if (this.tool === 'hand') this.pan(...steps[e.key].map(v => -40*v))
      if (this.live && this.live.tool !== 'line') this.extend(...this.cursor)
      this.drawCursor()
    } else if (e.key === ' ' && this.cursor && this.tool !== 'hand') {
      if (this.live?.tool === 'line') this.extend(...this.cursor)
      else if (this.live) this.commit()
      else { this.begin(...this.cursor); if (this.tool === 'point') this.commit() }
    } else if (e.key === 'Enter' && this.live) this.commit()
    else if (e.key === 'Escape' && this.live) this.drop()
    else return
    e.preventDefault()
  }

  // The server has drawn all strokes that were sent: show its picture in place of the sketches
  async refreshLabels() {
    const sent = new Set(this.pending)
    await this.layers.labels.load({again: true})
    this.pending = this.pending.filter(s => !sent.has(s))
    this.layers.labels.draw()
  }
  setLayer(name, on, opacity) {
    const layer = this.layers[name], was = layer.on
    layer.on = on
    layer.canvas.style.opacity = opacity
    if (on && !was) return layer.load()
    if (!on && was) layer.draw()
  }
}

/* ---- The server ------------------------------------------------------------------------------------------------ */

class Refused extends Error { constructor(text, status) { super(text); this.status = status } }

async function ask(path, body) {
  let answer
  try {
    answer = await fetch(path, body === undefined ? {} : {method: 'POST', body: JSON.stringify(body), headers: {'Content-Type': 'application/json'}})
  } catch { throw new Refused('sasformer_annotate does not answer: start it again, and open the link that it prints', 0) }
  if (answer.ok) return answer
  const text = await answer.text()
  let error = text.trim()
  try { error = JSON.parse(text).error } catch {}
  throw new Refused(error, answer.status)
}
const askJson = async (path, body) => (await ask(path, body)).json()

// Where a stage has its pictures from: of photograph and labels there are fine ones of a part
const pictures = (ask, number) => ({
  parts: ['photo', 'labels'],
  async picture(name, box, size) {
    const path = `/api/photos/${number()}/${name === 'photo' ? 'image' : name}`
    const answer = await ask(this.parts.includes(name) ? `${path}?box=${box}&size=${size}` : path)
    return createImageBitmap(await answer.blob())
  }})

// Sends steps one after the other; where one is refused, it waits with those behind it until somebody says what to do
class Saver {
  constructor({askJson, onState, onTrouble, onIdle}) {
    Object.assign(this, {askJson, onState, onTrouble, onIdle, queue: [], stuck: null})
  }
  add(path, body = {}) { this.queue.push({path: this.base+path, body}); this.run() }
  async run() {
    if (this.busy || this.stuck) return
    this.busy = true
    while (this.queue.length && !this.stuck) {
      const {path, body} = this.queue[0]
      this.onState('Saving …')
      try {
        this.state = {...this.state, ...await this.askJson(path, {...body, version: this.state.version})}
        this.queue.shift()
        this.onState('Saved')
      } catch (e) { this.stuck = e; this.onState('Not saved'); this.onTrouble(e) }
    }
    this.busy = false
    if (!this.stuck) this.onIdle()
  }
  async again() {
    const stuck = this.stuck
    try { if (stuck.status === 409) this.state = await this.askJson(this.base+'/photo') } catch (e) { return this.onTrouble(e) }
    this.stuck = null
    await this.run()
  }
  // The refused step alone: those behind it may be right
  async drop() {
    const [refused] = this.queue
    this.state = await this.askJson(this.base+'/photo')
    if (this.queue[0] === refused) this.queue.shift()
    this.stuck = null
    this.onState('Saved')
    await this.run()
  }
  // Finish the stroke in hand and save all there is; can another photograph be opened then?
  async settled(stage) {
    for (;;) {
      if (stage.live) stage.commit()
      if (!this.busy) return !this.stuck
      await new Promise(done => setTimeout(done, 20))
    }
  }
}

/* ---- The page --------------------------------------------------------------------------------------------------- */

const $ = id => document.getElementById(id)
const percent = v => v === 0 ? '0 %' : v < .001 ? '<0.1 %' : `${(100*v).toFixed(v < .1 ? 1 : 0)} %`
const sum = list => list.reduce((a, b) => a+b, 0)
function make(tag, props = {}, ...children) {
  const element = Object.assign(document.createElement(tag), props)
  element.append(...children)
  return element
}

class Page {
  async start() {
    this.set = await askJson('/api/set')
    const {set} = this, source = pictures(ask, () => this.n)
    this.stage = new Stage($('stage'), source, {limits: set.limits, onStroke: s => this.saver.add('/strokes', s),
      onView: () => $('zoom-fit').textContent = this.stage.fitted ? 'Fit' : `${Math.round(100*this.stage.view.scale)} %`})
    this.stage.palette = set.palette
    this.saver = new Saver({askJson, onState: text => this.saved(text), onTrouble: e => this.trouble(e.message, true),
      onIdle: () => this.stage.refreshLabels().catch(e => this.trouble(e.message))})
    this.makeList(); this.makeTools(); this.makeClasses(); this.wire()
    const wanted = set.photos.findIndex(p => p.name === decodeURIComponent(location.hash.slice(1)))
    await this.open(Math.max(0, wanted))
    this.poll()
  }

  // -- photographs
  makeList() {
    this.rows = this.set.photos.map((photo, n) => {
      const bar = make('span', {className: 'bar'}), text = make('span')
      bar.ariaHidden = 'true'
      const button = make('button', {onclick: () => this.open(n)},
        make('img', {src: `/api/photos/${n}/thumb`, loading: 'lazy', alt: '', width: 60, height: 46}),
        make('span', {className: 'name', textContent: photo.name}), make('span', {className: 'far'}, bar, text))
      button.title = photo.name
      $('list').append(make('li', {}, button))
      return {button, bar, text}
    })
    this.set.photos.forEach((_, n) => this.showRow(n))
  }
  showRow(n) {
    const {labels, problem} = this.set.photos[n], {bar, text} = this.rows[n]
    if (problem) text.textContent = 'cannot be read'
    else if (!labels) text.textContent = '…'
    else {
      const [counts, pixels] = labels, all = sum(counts)
      text.textContent = all === pixels ? 'mask' : all ? percent(all/pixels) : 'no labels'
      bar.replaceChildren(...counts.flatMap((c, k) => {
        const piece = make('span')
        piece.style.flex = c; piece.style.background = colour(this.set.palette[k])
        return c ? [piece] : []
      }))
    }
  }
  async open(n) {
    if (n < 0 || n >= this.rows.length) return
    if (!await this.saver.settled(this.stage)) return this.trouble(this.saver.stuck.message, true)
    this.trouble(null)
    this.rows[this.n]?.button.removeAttribute('aria-current')
    this.n = n
    this.rows[n].button.setAttribute('aria-current', 'true')
    this.rows[n].button.scrollIntoView({block: 'nearest'})
    $('title').textContent = this.set.photos[n].name
    history.replaceState(null, '', `#${encodeURIComponent(this.set.photos[n].name)}`)
    this.saver.base = `/api/photos/${n}`
    this.stage.photo = null
    try {
      const photo = await askJson(this.saver.base+'/photo')
      if (this.n !== n) return
      this.saver.state = photo
      this.saved('')
      await this.stage.show(photo)
      if (this.n !== n) return
      if (!this.sized) this.size(2*Math.round(Math.max(photo.width, photo.height)/300)+1)
      $('stage').dataset.ready = n
    } catch (e) { for (const l of Object.values(this.stage.layers)) { l.clear(); l.draw() } this.trouble(e.message) }
  }
  async next() {
    const {n, why} = await askJson(`/api/photos/${this.n}/next`)
    if (n !== null) await this.open(n)
    this.hint(why)
  }

  // -- tools and classes
  makeTools() {
    for (const [tool, key] of Object.entries(TOOLS)) {
      const button = make('button', {textContent: tool[0].toUpperCase()+tool.slice(1), title: `${tool} (${key})`, onclick: () => this.tool(tool)})
      button.dataset.tool = tool
      button.setAttribute('aria-pressed', 'false')
      $('tool-buttons').append(button)
    }
    this.tool('brush')
    $('size').max = Math.min(this.set.limits.width, 201)
  }
  tool(tool) {
    if (this.stage.live) this.stage.commit()
    this.stage.tool = tool
    for (const b of $('tool-buttons').children) b.setAttribute('aria-pressed', b.dataset.tool === tool)
    this.hint(tool === 'line' ? 'Drag a line, or click its corners and end with Enter or a double click' : '')
  }
  size(pixels) {
    this.stage.width = clamp(pixels | 1, 1, +$('size').max)
    $('size').value = this.stage.width
    $('size-shown').textContent = `${this.stage.width} px`
    this.stage.drawCursor()
    this.sized = true
  }
  makeClasses() {
    this.set.classes.forEach((name, k) => {
      const swatch = make('span', {className: 'swatch'}), count = make('small')
      swatch.style.background = colour(this.set.palette[k])
      const button = make('button', {onclick: () => this.cls(k)}, make('span', {className: 'key', textContent: k < CLASS_KEYS ? k+1 : ''}),
        swatch, make('span', {className: 'name', textContent: name}), count)
      button.setAttribute('aria-pressed', 'false')
      $('class-buttons').append(button)
    })
    this.cls(0)
  }
  cls(k) {
    if (this.stage.live) this.stage.commit()
    this.stage.cls = k
    ;[...$('class-buttons').children].forEach((b, i) => b.setAttribute('aria-pressed', i === k))
    $('class-buttons').children[k].scrollIntoView({block: 'nearest', inline: 'nearest'})
    if (this.stage.tool === 'eraser' || this.stage.tool === 'hand') this.tool('brush')
  }
  // After every step: what is labelled here, in the list and in all
  saved(text) {
    const {state} = this.saver, photos = this.set.photos
    $('saved').textContent = text
    photos[this.n].labels = [state.counts, state.pixels]
    photos[this.n].problem = null
    this.showRow(this.n)
    this.statistics()
    const waiting = this.saver.queue.length
    $('undo').disabled = !state.undo && !waiting; $('redo').disabled = !state.redo
  }
  statistics() {
    const {photos, classes} = this.set, here = photos[this.n].labels, total = here ? sum(here[0]) : 0
    const known = photos.filter(p => p.labels), n = known.filter(p => sum(p.labels[0])).length
    $('summary').textContent = `${n} of ${photos.length} photographs labelled${here ? `; here ${percent(total/here[1])} of the pixels` : ''}`
    ;[...$('class-buttons').children].forEach((b, k) => {
      const seen = known.filter(p => p.labels[0][k]).length
      b.querySelector('small').textContent = `${here ? percent(here[0][k]/here[1]) : ''} · ${seen}`
      b.title = `${classes[k]}: ${here ? here[0][k] : 0} pixels here, in ${seen} photographs`
    })
  }
  hint(text) {
    $('hint').textContent = text
    clearTimeout(this.hinted)
    this.hinted = setTimeout(() => $('hint').textContent = '', 8000)
  }
  trouble(text, choice = false) {
    $('trouble').hidden = !text
    $('trouble-text').textContent = text ?? ''
    $('trouble-again').hidden = $('trouble-drop').hidden = !choice
  }

  // -- layers
  layers() {
    for (const name of ['prediction', 'entropy'])
      this.stage.setLayer(name, $(`${name}-on`).checked, $(`${name}-opacity`).value/100)?.catch(e => this.trouble(e.message))
    this.stage.setLayer('labels', true, $('labels-opacity').value/100)
  }
  async accept() {
    await this.saver.add('/accept')
    this.hint('What had no label is labelled as predicted; undo takes it back')
  }

  // -- training
  async poll() {
    clearTimeout(this.polled)
    try {
      const state = await askJson('/api/train')
      this.showTraining(state)
      if (this.set.photos.some(p => !p.labels && !p.problem)) {   // still being counted
        const now = (await askJson('/api/set')).photos
        now.forEach((p, n) => { if (n !== this.n) { Object.assign(this.set.photos[n], p); this.showRow(n) } })
        this.statistics()
      }
    } catch (e) { if (!this.saver.stuck) this.trouble(e.message) }
    this.polled = setTimeout(() => this.poll(), document.hidden ? 10000 : 2000)
  }
  showTraining(state) {
    const running = state.status === 'running', stopped = state.goes_on && !running
    this.training = state
    $('train').textContent = running ? 'Stop' : stopped ? 'Go on' : 'Train'
    $('new-run').hidden = !stopped
    $('method').disabled = $('steps').disabled = running
    $('progress').hidden = state.status === 'none'
    $('progress').value = state.progress
    const last = state.rows.at(-1), miou = last?.miou == null ? '' : `, mIoU ${(100*last.miou).toFixed(1)}`
    $('train-said').textContent = {none: 'Label a few photographs, then train.', finished: `Run ${state.run}: done${miou}`,
      running: `Run ${state.run}: ${state.rows.length ? `epoch ${state.rows.length} of ${state.epochs}${miou}${state.left ? `; ${state.left} left` : ''}` : state.said || 'starting'}`,
      stopped: `Run ${state.run}: stopped after epoch ${state.rows.length} of ${state.epochs}${miou}`,
      failed: state.said}[state.status]
    this.curves(state.rows)
    if (state.model !== this.model) {
      const first = !this.model
      this.model = state.model
      for (const id of ['prediction-on', 'entropy-on', 'accept']) $(id).disabled = !state.model
      if (first && state.status !== 'none' && this.asked) $('prediction-on').checked = true   // what was just trained is shown
      for (const name of ['prediction', 'entropy']) this.stage.layers[name].load({again: true}).catch(e => this.trouble(e.message))
      this.layers()
    }
  }
  curves(rows) {
    const svg = $('curves'), draw = (tag, props, text) => {
      const e = svg.appendChild(document.createElementNS('http://www.w3.org/2000/svg', tag))
      for (const [k, v] of Object.entries(props)) e.setAttribute(k, v)
      if (text) e.textContent = text
    }
    svg.replaceChildren()
    svg.toggleAttribute('hidden', !rows.length)
    const shown = [['train_loss', 'loss', 'loss', 4], ['miou', 'miou', 'mIoU', 150]]
    for (const [key, name, text, x] of shown) {
      const points = rows.filter(r => r[key] != null), top = name === 'miou' ? 1 : Math.max(...points.map(r => r[key]))
      if (!points.length) continue
      const place = r => [6+228*(rows.length > 1 ? (r.epoch-1)/(rows.length-1) : .5), 78-60*r[key]/(top || 1)].map(v => v.toFixed(1))
      draw('polyline', {class: name, points: points.map(place).join(' ')})
      if (points.length === 1) draw('circle', {class: name, cx: place(points[0])[0], cy: place(points[0])[1], r: 2, fill: 'none'})
      draw('text', {class: name, x, y: 12}, `${text} ${points.at(-1)[key].toFixed(3)}`)
    }
  }
  async train(isNew = false) {
    const running = this.training?.status === 'running'
    this.asked = true
    try {
      while (this.saver.busy) await new Promise(done => setTimeout(done, 20))
      await askJson(`/api/train/${running ? 'stop' : 'start'}`, running ? {} : {method: $('method').value, steps: +$('steps').value, new: isNew})
    } catch (e) { $('train-said').textContent = e.message; return }
    this.poll()
  }

  // -- events
  wire() {
    const click = (id, f) => $(id).addEventListener('click', f)
    click('undo', () => this.undo()); click('redo', () => this.saver.add('/redo'))
    click('zoom-in', () => this.stage.zoom(1.4)); click('zoom-out', () => this.stage.zoom(1/1.4)); click('zoom-fit', () => this.stage.fit())
    click('next', () => this.next().catch(e => this.trouble(e.message)))
    click('accept', () => this.accept()); click('train', () => this.train()); click('new-run', () => this.train(true))
    click('trouble-again', () => { this.trouble(null); this.saver.again() })
    click('trouble-drop', () => { this.trouble(null); this.saver.drop().catch(e => this.trouble(e.message, true)) })
    click('show-keys', () => $('keys').showModal()); click('keys-close', () => $('keys').close())
    for (const id of ['photos', 'side']) click(`show-${id}`, e => {
      e.target.setAttribute('aria-expanded', $(id).classList.toggle('open'))
    })
    $('stage').addEventListener('pointerdown', () => ['photos', 'side'].forEach(id => { $(id).classList.remove('open'); $(`show-${id}`).setAttribute('aria-expanded', 'false') }))
    $('size').addEventListener('input', e => this.size(+e.target.value))
    for (const name of ['labels', 'prediction', 'entropy']) {
      $(`${name}-opacity`).addEventListener('input', () => this.layers())
      $(`${name}-on`)?.addEventListener('change', () => this.layers())
    }
    for (const [method, text] of Object.entries(this.set.methods)) $('method').append(make('option', {value: method, textContent: text}))
    $('method').value = 'sasformer'
    addEventListener('keydown', e => this.key(e))
    addEventListener('beforeunload', e => { if (this.saver.queue.length) e.preventDefault() })
    this.layers()
  }
  undo() { if (this.stage.live) this.stage.drop(); else this.saver.add('/undo') }
  key(e) {
    if (e.target.matches('input[type=number], select') || $('keys').open) return
    const key = e.key.toLowerCase()
    if (e.ctrlKey || e.metaKey) {
      if (key === 'z' && !e.shiftKey && !$('undo').disabled) this.undo()
      else if ((key === 'y' || key === 'z' && e.shiftKey) && !$('redo').disabled) this.saver.add('/redo')
      else return
    } else if (e.altKey) return
    else if (key >= '1' && key <= String(CLASS_KEYS)) { if (key <= this.set.classes.length) this.cls(key-1) }
    else {
      const tool = Object.keys(TOOLS).find(t => TOOLS[t] === e.key.toUpperCase())
      const others = {'[': () => this.size(this.stage.width-2), ']': () => this.size(this.stage.width+2), '+': () => this.stage.zoom(1.4),
        '=': () => this.stage.zoom(1.4), '-': () => this.stage.zoom(1/1.4), 0: () => this.stage.fit(), n: () => $('next').click(),
        pageup: () => this.open(this.n-1), pagedown: () => this.open(this.n+1), '?': () => $('keys').showModal(),
        v: () => $('prediction-on').click(), u: () => $('entropy-on').click()}
      if (tool) this.tool(tool)
      else if (others[key]) others[key]()
      else return
    }
    e.preventDefault()
  }
}

/* ---- In a notebook: the canvas as an anywidget ------------------------------------------------------------------ */

// Messages to the kernel in place of requests to the server, with answers of the same form
function askKernel(model) {
  const waiting = new Map()
  let last = 0
  model.on('msg:custom', (answer, buffers) => {
    const done = waiting.get(answer.id)
    waiting.delete(answer.id)
    done?.(answer, buffers)
  })
  return (path, body) => new Promise((resolve, reject) => {
    const id = ++last
    waiting.set(id, ({status, data, type}, buffers) => {
      if (status !== 200) return reject(new Refused(data.error, status))
      resolve({json: async () => data, blob: async () => new Blob(buffers, {type})})
    })
    model.send({id, path, body})
  })
}

async function renderWidget({model, el}) {
  const ask = askKernel(model), askJson = async (path, body) => (await ask(path, body)).json()
  const set = await askJson('/api/set'), stageBox = make('div'), said = make('span'), trouble = make('div', {className: 'trouble'})
  trouble.setAttribute('role', 'alert')
  stageBox.style.height = `${model.get('height')}px`
  let n = 0
  const saver = new Saver({askJson, onState: text => said.textContent = text, onIdle: () => stage.refreshLabels(),
    onTrouble: e => trouble.replaceChildren(`${e.message} `, make('button', {textContent: 'Try again', onclick: () => { trouble.replaceChildren(); saver.again() }}),
      make('button', {textContent: 'Drop it', onclick: () => { trouble.replaceChildren(); saver.drop() }}))})
  const stage = new Stage(stageBox, pictures(ask, () => n), {limits: set.limits, onStroke: s => saver.add('/strokes', s)})
  stage.palette = set.palette
  const open = async to => {
    if (!set.photos[to] || !await saver.settled(stage)) return choice.value = n
    n = to
    choice.value = n
    saver.base = `/api/photos/${n}`
    saver.state = await askJson(saver.base+'/photo')
    await stage.show(saver.state)
    el.dataset.ready = to
  }
  const button = (text, onclick) => make('button', {textContent: text, onclick})
  const toggles = (names, chosen, choose) => names.map((name, k) => {
    const b = button(name, () => { for (const o of b.parentNode.children) if (o.toggle === b.toggle) o.setAttribute('aria-pressed', o === b); choose(k) })
    b.toggle = choose
    b.setAttribute('aria-pressed', k === chosen)
    return b
  })
  const choice = make('select', {onchange: () => open(+choice.value)}, ...set.photos.map((p, k) => make('option', {value: k, textContent: p.name})))
  choice.ariaLabel = 'Photograph'
  const size = make('input', {type: 'range', min: 1, max: 101, step: 2, value: stage.width, oninput: () => { stage.width = +size.value; stage.drawCursor() }})
  size.ariaLabel = 'Size'
  const classes = toggles(set.classes, 0, k => stage.cls = k)
  classes.forEach((b, k) => { const s = make('span', {className: 'swatch'}); s.style.background = colour(set.palette[k]); b.prepend(s) })
  el.classList.add('sasformer-annotate')
  el.append(make('div', {className: 'bar'}, button('◀', () => open(n-1)), choice, button('▶', () => open(n+1)),
    ...toggles(Object.keys(TOOLS), 0, k => stage.tool = Object.keys(TOOLS)[k]), size,
    button('Undo', () => saver.add('/undo')), button('Redo', () => saver.add('/redo')), button('Fit', () => stage.fit()), said),
  make('div', {className: 'bar'}, ...classes), trouble, stageBox)
  await open(0)
}

export default {render: ({model, el}) => { renderWidget({model, el}).catch(e => el.append(e.message)) }}

if (document.getElementById('stage') && document.getElementById('class-buttons')) {
  const page = globalThis.page = new Page()
  page.start().catch(e => page.trouble(e.message))
}
